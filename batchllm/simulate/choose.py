"""Which policy is the fastest for a window, and how it is carried out."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from batchllm.cache.block_counts import BlockCounts
from batchllm.prefix.plan import PrefixPlan, plan_tokens, reorder
from batchllm.prefix.policies.in_time import in_time
from batchllm.prefix.policies.registry import POLICIES, STREAMING
from batchllm.request import RaggedTokens
from batchllm.scheduler.factory import SchedulerLimits, make_scheduler
from batchllm.simulate.compiled import compiled_simulator
from batchllm.simulate.cost import CostModel
from batchllm.simulate.simulator import END_TOKEN, SimulatedRun, simulate

Ints = NDArray[np.int64]
CANDIDATES = ("dfs", "ratio", "dual-scan")  # on a draw, the first
_LARGE, _SMALL = 16_384, 1024  # leaves that are simulated, compiled and not
_WORTH_THREADS = 1024  # leaves
_RUN = 64  # leaves taken together
_MULTIPLE = 128  # products are computed in tiles of so many rows
_LEAST_STEP = 256
_ROOM = (0.8, 1.0, 1.25, 1.6)  # of an even step: some begin before others have anything to do
_EARLY = (0.6, 0.75, 0.9, 1.05)  # of a run's steps: long answers are to be through by then


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy, and what is made of its order.

    Steps have `step_tokens` tokens at most (None: as many as they may have), and long answers are
    moved up as `in_time` does for `outputs_per_step` (None: they are not).
    """

    policy: str
    step_tokens: int | None = None
    outputs_per_step: float | None = None

    def __str__(self) -> str:
        text = self.policy
        if self.step_tokens is not None:
            text += f", {self.step_tokens:,} tokens a step"
        return text if self.outputs_per_step is None else f"{text}, long answers early"

    def order(self, plan: PrefixPlan, outputs: Ints) -> PrefixPlan:
        """A plan as it was chosen; `outputs` as in `reorder`."""
        return self.arrange(reorder(plan, self.policy, outputs), outputs)

    def arrange(self, plan: PrefixPlan, outputs: Ints) -> PrefixPlan:
        """The same of a plan that is in the policy's order."""
        order = plan.leaf_order
        if self.outputs_per_step is not None:
            order = in_time(order, outputs, self.outputs_per_step)
        return replace(plan, leaf_order=order, step_tokens=self.step_tokens)


def simulate_choice(
    plan: PrefixPlan, outputs: Ints, choice: Choice, limits: SchedulerLimits, costs: CostModel
) -> SimulatedRun:
    """Run a plan, put in the choice's order, on a fresh scheduler; `outputs` as in `simulate`.

    These are also what the order goes by.
    """
    if choice.policy in POLICIES:
        plan = choice.order(plan, outputs)
    return _simulate(plan, outputs, choice.policy, limits, costs)


def _simulate(
    plan: PrefixPlan, outputs: Ints, policy: str, limits: SchedulerLimits, costs: CostModel
) -> SimulatedRun:
    compiled = compiled_simulator()
    if compiled and policy != STREAMING:
        return compiled(plan, outputs, limits, costs)
    scheduler = make_scheduler(policy, limits, frozenset({END_TOKEN}), holder=BlockCounts)
    return simulate(plan, outputs, scheduler, costs)


def choose_policy(
    plan: PrefixPlan,
    expected: Ints,
    limits: SchedulerLimits,
    costs: CostModel,
    *,
    outputs: Ints | None = None,
    knows: bool = True,
) -> Choice:
    """The candidate with the least simulated time.

    Args:
        plan: what is to run.
        expected: the answers' expected lengths, [num_leaves], which orders go by.
        limits: what the scheduler may use.
        costs: the machine and the model.
        outputs: the lengths that answers have in the simulation, [num_leaves]; None: as expected.
        knows: whether these are more than limits. Else nothing is chosen but the policy: steps
            thin enough for answers as long as they may be would starve on short ones.

    A window too large to simulate in a moment is judged by a sample of its rows, taken in runs of
    neighbours so that they share what the window shares.

    Where attention and products run side by side, steps that are all alike are best: then prompts
    are spread over all of the steps, so steps about that thin are tried. Where answers are not
    alike, long ones are moved up more or less far. Both are looked for one after the other, with
    all policies each time: on twenty tables that came within 0.5 % of all that was tried.
    """
    if len(expected) == 0:
        return Choice(CANDIDATES[0])
    plan, leaves = sample_leaves(plan)
    expected, outputs = expected[leaves], (expected if outputs is None else outputs)[leaves]
    trials = _Trials(plan, expected, outputs, limits, costs)
    best = trials.best(map(Choice, CANDIDATES))
    if not knows:
        return best
    if costs.overlaps:
        trials.best(trials.thinner(best))
        best = trials.best(trials.by_any_policy())
    if expected.min() < expected.max():
        best = trials.best(trials.earlier())
        if costs.overlaps:
            trials.best(trials.thinner(best))
            best = trials.best(trials.by_any_policy())
    return best


class _Trials:
    """What has been tried, side by side where a simulation is compiled."""

    def __init__(
        self,
        plan: PrefixPlan,
        expected: Ints,
        outputs: Ints,
        limits: SchedulerLimits,
        costs: CostModel,
    ) -> None:
        self.runs: dict[Choice, SimulatedRun] = {}
        self._plans = {policy: reorder(plan, policy, expected) for policy in CANDIDATES}
        self._expected, self._outputs = expected, outputs
        self._limits, self._costs = limits, costs

    def best(self, choices: Iterable[Choice]) -> Choice:
        """The best of all that were tried, these too."""
        new = [choice for choice in choices if choice not in self.runs]
        self.runs |= zip(new, self._run_all(new), strict=True)
        return min(self.runs, key=lambda choice: self.runs[choice].seconds)

    def thinner(self, choice: Choice) -> list[Choice]:
        """With about as many tokens a step as spread all over all of its steps."""
        run = self.runs[choice]
        tokens = run.computed_prompt_tokens + run.recomputed_tokens + run.output_tokens
        sizes = {round(tokens / run.steps * room / _MULTIPLE) * _MULTIPLE for room in _ROOM}
        most = self._limits.max_num_batched_tokens
        return [replace(choice, step_tokens=n) for n in sorted(sizes) if _LEAST_STEP <= n < most]

    def by_any_policy(self) -> list[Choice]:
        """The best one's, by every policy."""
        best = self.best(())
        return [replace(best, policy=policy) for policy in CANDIDATES]

    def earlier(self) -> list[Choice]:
        """Every policy's best, with long answers through before the run it had was."""
        found = []
        for policy in CANDIDATES:
            mine = [choice for choice in self.runs if choice.policy == policy]
            best = min(mine, key=lambda choice: self.runs[choice].seconds)
            pace = float(self._expected.sum()) / self.runs[best].steps
            found += [replace(best, outputs_per_step=pace / part) for part in _EARLY]
        return found

    def _run_all(self, choices: list[Choice]) -> list[SimulatedRun]:
        """Side by side, if that is worth threads and memory is not too short to start any."""
        if len(self._outputs) >= _WORTH_THREADS:
            with suppress(RuntimeError), ThreadPoolExecutor() as pool:
                return list(pool.map(self._run, choices))
        return [self._run(choice) for choice in choices]

    def _run(self, choice: Choice) -> SimulatedRun:
        plan = choice.arrange(self._plans[choice.policy], self._expected)
        return _simulate(plan, self._outputs, choice.policy, self._limits, self._costs)


def sample_leaves(plan: PrefixPlan, among: Ints | None = None) -> tuple[PrefixPlan, Ints]:
    """A plan of as many of the leaves as are simulated in a moment, and which they were.

    `among` are the leaves in question, ascending; None are all.
    """
    tree, most = plan.tree, _LARGE if compiled_simulator() else _SMALL
    leaves = np.arange(tree.num_leaves) if among is None else among
    if len(leaves) > most:
        starts = np.linspace(0, len(leaves) - _RUN, most // _RUN).astype(np.int64)
        leaves = leaves[np.unique((starts[:, None] + np.arange(_RUN)).ravel())]
    if len(leaves) == tree.num_leaves:
        return plan, leaves
    rows = tree.leaf_row[leaves]
    tokens = RaggedTokens.from_sequences([plan.tokens[row] for row in rows.tolist()])
    sample = plan_tokens(
        tokens, plan.params, plan.params_index[rows], row_index=plan.row_index[rows], policy="dfs"
    )
    return sample, leaves[sample.tree.leaf_row]
