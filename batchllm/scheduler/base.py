"""What a scheduler is to whoever drives it."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.plan import PrefixPlan
from batchllm.scheduler.batch import Batch, FinishedSequence, StepOutput

Ints = NDArray[np.int64]


@dataclass(slots=True)
class SchedulerStats:
    """What a scheduler did, in tokens and events; adds up over windows.

    `computed_prompt_tokens` is all work on prompts, repeats after preemption included;
    `recomputed_tokens` is what was repeated, of prompts and of answers. `vain_tokens` are those
    computed for answers that had ended, which was not known yet: at most one an answer.
    """

    steps: int = 0
    computed_prompt_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    vain_tokens: int = 0

    def since(self, before: "SchedulerStats") -> "SchedulerStats":
        """What was added since a copy was taken."""
        return SchedulerStats(
            self.steps - before.steps,
            self.computed_prompt_tokens - before.computed_prompt_tokens,
            self.recomputed_tokens - before.recomputed_tokens,
            self.preemptions - before.preemptions,
            self.vain_tokens - before.vain_tokens,
        )


class StepScheduler(Protocol):
    """Turns a planned window into one batch a step.

    `schedule` and `update` take turns. Who runs steps ahead calls `expect` for a batch instead of
    waiting for its result, then may `schedule` the next, and only then must `update` the first:
    no more than one batch is expected at a time. The batches must be executed in the order they
    were made in, as blocks are given to another as soon as no batch to come reads them.
    """

    stats: SchedulerStats

    def add(self, plan: PrefixPlan) -> list[FinishedSequence]:
        """Queue a window; the last one must be finished.

        Returns the sequences that could not run even alone in the pool, ended by `kv_memory`.
        """
        ...

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs, or has ended unnoticed as `update` will tell."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether there is something to schedule: not where all that are left are about to end."""
        ...

    def schedule(self, ends: Ints | None = None) -> Batch:
        """Choose the next step's tokens; never none while work is left.

        Who knows after how many outputs each leaf ends (`ends`, [num_leaves]; a simulator does)
        is given batches without tokens and blocks, and where nothing ends and nothing can join, one
        of decodes that stands for several steps.
        """
        ...

    def expect(self, batch: Batch) -> None:
        """Go on as if none of the tokens that a batch samples ended an answer.

        But an answer that is then as long as it may be does end. The batch is the one scheduled
        last; the one before it has been updated.
        """
        ...

    def update(self, batch: Batch, output: StepOutput) -> list[FinishedSequence]:
        """Append the sampled tokens; returns the sequences that are finished by them."""
        ...

    def running_leaves(self) -> Ints:
        """The leaves whose sequences run, but for those whose first token a batch is to sample.

        While a batch is expected, those it samples for are among them, perhaps twice.
        """
        ...

    def blocks_alone(self, leaf: int) -> int:
        """Blocks a leaf needs to its longest end, with nothing else in the pool."""
        ...

    @property
    def peak_kv_blocks(self) -> int:
        """The most blocks that were ever in use at once."""
        ...

    def check(self) -> None:
        """Assert its own books (for tests)."""
        ...
