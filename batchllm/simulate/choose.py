"""Which policy is the fastest for a window, and with how many tokens a step."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from batchllm.cache.block_counts import BlockCounts
from batchllm.prefix.plan import PrefixPlan, plan_tokens, reorder
from batchllm.prefix.policies.registry import POLICIES, STREAMING
from batchllm.request import RaggedTokens
from batchllm.scheduler.factory import SchedulerLimits, make_scheduler
from batchllm.simulate.compiled import compiled_simulator
from batchllm.simulate.cost import CostModel
from batchllm.simulate.simulator import END_TOKEN, SimulatedRun, simulate

Ints = NDArray[np.int64]
CANDIDATES = ("dfs", "ratio", "dual-scan")  # on a draw, the first
_SAMPLE_LEAVES = 4096
_RUN = 64  # leaves taken together
_MULTIPLE = 128  # products are computed in tiles of so many rows
_LEAST_STEP = 256
_ROOM = (0.8, 1.0, 1.25, 1.6)  # of an even step: some begin before others have anything to do


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy, and how many tokens its steps have at most; None is as many as they may have."""

    policy: str
    step_tokens: int | None = None

    def __str__(self) -> str:
        if self.step_tokens is None:
            return self.policy
        return f"{self.policy}, {self.step_tokens:,} tokens a step"

    def order(self, plan: PrefixPlan, outputs: Ints) -> PrefixPlan:
        """A plan as it was chosen; `outputs` as in `reorder`."""
        return replace(reorder(plan, self.policy, outputs), step_tokens=self.step_tokens)


def simulate_policy(
    plan: PrefixPlan,
    outputs: Ints,
    policy: str,
    limits: SchedulerLimits,
    costs: CostModel,
    step_tokens: int | None = None,
) -> SimulatedRun:
    """Run a plan, put in the policy's order, on a fresh scheduler; `outputs` as in `simulate`."""
    if policy in POLICIES:
        plan = Choice(policy, step_tokens).order(plan, outputs)
    compiled = compiled_simulator()
    if compiled and policy != STREAMING:
        return compiled(plan, outputs, limits, costs)
    scheduler = make_scheduler(policy, limits, frozenset({END_TOKEN}), holder=BlockCounts)
    return simulate(plan, outputs, scheduler, costs)


def choose_policy(
    plan: PrefixPlan, outputs: Ints, limits: SchedulerLimits, costs: CostModel
) -> Choice:
    """The candidate with the least simulated time for answers of `outputs` [num_leaves] tokens.

    A window too large to simulate in a moment is judged by a sample of its rows, taken in runs of
    neighbours so that they share what the window shares.

    Where attention and products run side by side, steps that are all alike are best: then prompts
    are spread over all of the steps. The best policy is tried with steps about that thin, and the
    others with what suits it best.
    """
    plan, outputs = sample_leaves(plan, outputs)
    runs: dict[Choice, SimulatedRun] = {}

    def try_out(choices: Iterable[Choice]) -> Choice:
        for choice in choices:
            if choice not in runs:
                runs[choice] = simulate_policy(
                    plan, outputs, choice.policy, limits, costs, choice.step_tokens
                )
        return min(runs, key=lambda choice: runs[choice].seconds)

    best = try_out(Choice(policy) for policy in CANDIDATES)
    if not costs.overlaps:
        return best
    sizes = _thin_steps(runs[best], limits.max_num_batched_tokens)
    best = try_out(Choice(best.policy, size) for size in sizes)
    return try_out(Choice(policy, best.step_tokens) for policy in CANDIDATES)


def _thin_steps(run: SimulatedRun, most: int) -> list[int]:
    """Tokens a step that would spread a run's over all its steps, or about so many."""
    tokens = run.computed_prompt_tokens + run.recomputed_tokens + run.output_tokens
    sizes = {round(tokens / run.steps * room / _MULTIPLE) * _MULTIPLE for room in _ROOM}
    return sorted(size for size in sizes if _LEAST_STEP <= size < most)


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
