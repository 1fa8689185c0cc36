"""The real scheduler, with the cost model in the model's place."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.plan import PrefixPlan
from batchllm.scheduler.base import StepScheduler
from batchllm.scheduler.batch import StepOutput
from batchllm.simulate.cost import CostModel

Ints = NDArray[np.int64]
END_TOKEN = 1  # what a simulated answer ends with; every other token of it is 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """What a run would take, in seconds and tokens.

    Of attention and products, `hidden_seconds` go by at the same time.
    """

    gemm_seconds: float
    head_seconds: float
    attention_seconds: float
    overhead_seconds: float
    hidden_seconds: float
    steps: int
    prompt_tokens: int
    computed_prompt_tokens: int
    recomputed_tokens: int
    output_tokens: int
    preemptions: int
    failed: int
    peak_kv_blocks: int

    @property
    def seconds(self) -> float:
        busy = self.gemm_seconds + self.head_seconds + self.attention_seconds
        return busy + self.overhead_seconds - self.hidden_seconds


def _ignore(num_ended: int) -> None:
    pass


def simulate(
    plan: PrefixPlan,
    outputs: Ints,
    scheduler: StepScheduler,
    costs: CostModel,
    on_ended: Callable[[int], None] = _ignore,
) -> SimulatedRun:
    """Run `plan` to its end.

    Args:
        plan: what to run.
        outputs: how many tokens each leaf's answer has in truth, [num_leaves], >= 1. The scheduler
            is told as `END_TOKEN` comes, which must be among its `eos_token_ids`; it knows
            beforehand only of rows that ignore it.
        scheduler: a fresh one.
        costs: the machine and the model.
        on_ended: told after every step how many answers have ended.
    """
    ends = np.minimum(outputs, plan.max_tokens[plan.tree.leaf_row])
    failed = len(scheduler.add(plan))
    gemm = head = attention = overhead = hidden = 0.0
    output_tokens, num_ended = 0, failed
    while scheduler.has_unfinished:
        batch = scheduler.schedule(ends)
        cost = costs.cost(batch)
        gemm, head = gemm + cost.gemm, head + cost.head
        attention, overhead = attention + cost.attention, overhead + cost.overhead
        hidden += cost.hidden
        samples = batch.samples
        last = samples.output_position + batch.num_steps >= ends[samples.leaf]
        tokens = last.astype(np.int32) * np.int32(END_TOKEN)
        num_ended += len(scheduler.update(batch, StepOutput(tokens)))
        on_ended(num_ended)
        output_tokens += len(samples) * batch.num_steps
    stats = scheduler.stats
    return SimulatedRun(
        gemm_seconds=gemm,
        head_seconds=head,
        attention_seconds=attention,
        overhead_seconds=overhead,
        hidden_seconds=hidden,
        steps=stats.steps,
        prompt_tokens=plan.tree.num_prompt_tokens,
        computed_prompt_tokens=stats.computed_prompt_tokens,
        recomputed_tokens=stats.recomputed_tokens,
        output_tokens=output_tokens,
        preemptions=stats.preemptions,
        failed=failed,
        peak_kv_blocks=scheduler.peak_kv_blocks,
    )
