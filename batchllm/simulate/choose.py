"""Which policy is the fastest for a window."""

import numpy as np
from numpy.typing import NDArray

from batchllm.cache.block_counts import BlockCounts
from batchllm.prefix.plan import PrefixPlan, plan_tokens, reorder
from batchllm.prefix.policies.registry import POLICIES
from batchllm.request import RaggedTokens
from batchllm.scheduler.factory import SchedulerLimits, make_scheduler
from batchllm.simulate.cost import CostModel
from batchllm.simulate.simulator import END_TOKEN, SimulatedRun, simulate

Ints = NDArray[np.int64]
CANDIDATES = ("dfs", "ratio", "dual-scan")  # on a draw, the first
_SAMPLE_LEAVES = 4096
_RUN = 64  # leaves taken together


def simulate_policy(
    plan: PrefixPlan, outputs: Ints, policy: str, limits: SchedulerLimits, costs: CostModel
) -> SimulatedRun:
    """Run a plan, put in the policy's order, on a fresh scheduler; `outputs` as in `simulate`."""
    ordered = reorder(plan, policy, outputs) if policy in POLICIES else plan
    scheduler = make_scheduler(policy, limits, frozenset({END_TOKEN}), holder=BlockCounts)
    return simulate(ordered, outputs, scheduler, costs)


def choose_policy(
    plan: PrefixPlan, outputs: Ints, limits: SchedulerLimits, costs: CostModel
) -> str:
    """The candidate with the least simulated time for answers of `outputs` [num_leaves] tokens.

    A window too large to simulate in a moment is judged by a sample of its rows, taken in runs of
    neighbours so that they share what the window shares.
    """
    plan, outputs = sample_leaves(plan, outputs)
    seconds = {
        policy: simulate_policy(plan, outputs, policy, limits, costs).seconds
        for policy in CANDIDATES
    }
    return min(CANDIDATES, key=seconds.__getitem__)


def sample_leaves(plan: PrefixPlan, outputs: Ints) -> tuple[PrefixPlan, Ints]:
    """A plan of a few thousand of the leaves, with their outputs, or of all if they are few."""
    tree = plan.tree
    if tree.num_leaves <= _SAMPLE_LEAVES:
        return plan, outputs
    starts = np.linspace(0, tree.num_leaves - _RUN, _SAMPLE_LEAVES // _RUN).astype(np.int64)
    leaves = np.unique((starts[:, None] + np.arange(_RUN)).ravel())
    rows = tree.leaf_row[leaves]
    tokens = RaggedTokens.from_sequences([plan.tokens[row] for row in rows.tolist()])
    sample = plan_tokens(
        tokens, plan.params, plan.params_index[rows], row_index=plan.row_index[rows], policy="dfs"
    )
    return sample, outputs[leaves][sample.tree.leaf_row]
