"""What a run would take on a machine, by policy."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from batchllm.errors import UsageError
from batchllm.prefix.policies.registry import AUTO, POLICIES, STREAMING
from batchllm.progress import duration
from batchllm.report.prompts import Prompts
from batchllm.scheduler.factory import SchedulerLimits
from batchllm.simulate.bound import bound
from batchllm.simulate.choose import Choice, choose_policy, sample_leaves, simulate_choice
from batchllm.simulate.cost import CostModel
from batchllm.simulate.machine import Machine
from batchllm.simulate.shape import ModelShape
from batchllm.simulate.simulator import SimulatedRun


@dataclass(slots=True)
class PolicyOutcome:
    """What a policy comes to, added up over windows; tokens a second are prompt and output.

    `bound_share` is the share of T_opt that is reached, `total_share` of the bound without overlap.
    """

    policy: str
    seconds: float = 0.0
    steps: int = 0
    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    failed: int = 0
    peak_kv_tokens: int = 0
    bound_share: float = 0.0
    total_share: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / max(self.seconds, 1e-12)

    @property
    def saved_share(self) -> float:
        """Share of prompt tokens that were not computed, 0 to 1."""
        return 1 - self.computed_prompt_tokens / max(self.prompt_tokens, 1)

    def add(self, run: SimulatedRun, block_size: int) -> None:
        """Add a window's run."""
        self.seconds += run.seconds
        self.steps += run.steps
        self.prompt_tokens += run.prompt_tokens
        self.computed_prompt_tokens += run.computed_prompt_tokens
        self.output_tokens += run.output_tokens
        self.preemptions += run.preemptions
        self.failed += run.failed
        self.peak_kv_tokens = max(self.peak_kv_tokens, run.peak_kv_blocks * block_size)


@dataclass(slots=True)
class SimulationReport:
    """A table on a machine: the bound, and every policy's outcome.

    `chosen` is what `auto` took, one a window, which took `choosing_seconds` on this machine.
    `overlaps`: but for `streaming`, half of a step's attention runs beside the other half's
    products.
    """

    machine: str
    kv_tokens: int
    overlaps: bool = False
    bound_seconds: float = 0.0
    total_seconds: float = 0.0
    outcomes: list[PolicyOutcome] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)
    choosing_seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """A table for people."""
        lines = [
            f"on {self.machine}, KV memory for {self.kv_tokens:,} tokens; "
            f"at least {duration(self.bound_seconds)} (T_opt), "
            f"{duration(self.total_seconds)} without overlap",
            f"  {'policy':<12} {'time':>9} {'tokens/s':>10} {'of T_opt':>9} {'no overl.':>9} "
            f"{'saved':>7} {'peak KV':>11} {'preempted':>10}",
        ]
        lines += [
            f"  {o.policy:<12} {duration(o.seconds):>9} {o.tokens_per_second:>10,.0f} "
            f"{o.bound_share:>9.1%} {o.total_share:>9.1%} {o.saved_share:>7.1%} "
            f"{o.peak_kv_tokens:>11,} {o.preemptions:>10,}"
            for o in self.outcomes
        ]
        if self.overlaps:
            lines.append(
                "  assumed, but of streaming: attention beside products, where that is faster"
            )
        names = sorted(set(self.chosen))
        if names:
            lines.append(
                f"  auto takes {'; '.join(names)} (chosen in {self.choosing_seconds:.1f} s)"
            )
        return "\n".join(lines)


class TableSimulation:
    """Simulates one window after the other under every policy, each on a fresh scheduler."""

    def __init__(
        self,
        machine: Machine,
        shape: ModelShape,
        *,
        policies: Sequence[str] = (AUTO, *POLICIES, STREAMING),
        block_size: int = 16,
        max_model_len: int = 1 << 20,
        max_num_seqs: int = 1024,
        kv_tokens: int | None = None,
    ) -> None:
        """`kv_tokens` overrides what fits the machine's memory beside the weights.

        Raises:
            UsageError: the weights, or one block beside them, do not fit.
        """
        room = machine.kv_tokens(shape) if kv_tokens is None else kv_tokens
        if room < block_size:
            raise UsageError(
                f"KV memory for {room:,} tokens does not hold one block of {block_size}; "
                "give more with --kv-memory"
            )
        self._machine, self._shape = machine, shape
        self.costs = CostModel(machine, shape)
        self._their_costs = CostModel(machine.with_overlap(None), shape)
        self.limits = SchedulerLimits(
            num_blocks=room // block_size,
            block_size=block_size,
            max_model_len=max_model_len,
            max_num_batched_tokens=machine.max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
        )
        self._theirs = replace(
            self.limits,
            max_num_batched_tokens=machine.streaming_batched_tokens,
            max_num_seqs=machine.streaming_num_seqs,
        )
        self.report = SimulationReport(machine.name, room, self.costs.overlaps)
        self.report.outcomes = [PolicyOutcome(policy) for policy in policies]

    def expect(self, prompts: Prompts) -> float:
        """Seconds that a window would take, from a sample where it is large."""
        plan = prompts.plan("dfs")
        outputs = plan.max_tokens[plan.tree.leaf_row]
        some, leaves = sample_leaves(plan)
        some_outputs = outputs[leaves]
        run = simulate_choice(some, some_outputs, Choice("dfs"), self.limits, self.costs)
        whole, part = (
            bound(p.tree, o, self._machine, self._shape, self.report.kv_tokens).total
            for p, o in ((plan, outputs), (some, some_outputs))
        )
        return run.seconds * whole / part

    def add(self, prompts: Prompts) -> None:
        """Simulate a window."""
        report, ours = self.report, self.limits
        shared, flat = prompts.plan("dfs"), prompts.plan(STREAMING)
        outputs = shared.max_tokens[shared.tree.leaf_row]
        least = bound(shared.tree, outputs, self._machine, self._shape, report.kv_tokens)
        report.bound_seconds += least.overlap
        report.total_seconds += least.total
        runs: dict[Choice, SimulatedRun] = {}
        for outcome in report.outcomes:
            choice = Choice(outcome.policy)
            if choice.policy == AUTO:
                started = time.perf_counter()
                choice = choose_policy(shared, outputs, ours, self.costs)
                report.choosing_seconds += time.perf_counter() - started
                report.chosen.append(str(choice))
            if choice.policy == STREAMING:
                run = simulate_choice(
                    flat, prompts.output_tokens, choice, self._theirs, self._their_costs
                )
            else:
                run = runs.get(choice) or simulate_choice(shared, outputs, choice, ours, self.costs)
            runs[choice] = run
            outcome.add(run, ours.block_size)
            outcome.bound_share = report.bound_seconds / max(outcome.seconds, 1e-12)
            outcome.total_share = report.total_seconds / max(outcome.seconds, 1e-12)
