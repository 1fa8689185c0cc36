"""The loop: schedule, execute, update."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Protocol

from batchllm.cache.memory import ran_out_of_memory
from batchllm.errors import OutOfMemoryError
from batchllm.prefix.plan import PrefixPlan
from batchllm.scheduler.base import StepScheduler
from batchllm.scheduler.batch import Batch, FinishedSequence, StepOutput


class Runner(Protocol):
    """Runs one step and samples."""

    def execute(self, batch: Batch) -> StepOutput:
        """Compute the batch's tokens; return one token for each of its samples."""
        ...


class Engine:
    """Answers a planned window, step by step."""

    def __init__(
        self,
        scheduler: StepScheduler,
        runner: Runner,
        *,
        before_step: Callable[[Batch], None] = lambda batch: None,
        on_step: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.before_step = before_step
        self.on_step = on_step

    def run(self, plan: PrefixPlan) -> Iterator[FinishedSequence]:
        """Yield each of the plan's sequences when it is finished, in the order of finishing."""
        return chain.from_iterable(self.steps(plan))

    def steps(self, plan: PrefixPlan) -> Iterator[list[FinishedSequence]]:
        """Yield, after each step, the sequences it finished; first those that cannot be run."""
        yield self.scheduler.add(plan)
        while self.scheduler.has_unfinished:
            yield self.step()

    def step(self) -> list[FinishedSequence]:
        """One forward pass; returns the sequences it finished.

        Raises:
            OutOfMemoryError: the runner had none for it; the sequences are lost to the scheduler.
        """
        batch = self.scheduler.schedule()
        self.before_step(batch)
        try:
            output = self.runner.execute(batch)
        except Exception as error:
            if ran_out_of_memory(error):
                raise OutOfMemoryError(f"a step of {batch.num_tokens:,} tokens: {error}") from error
            raise
        finished = self.scheduler.update(batch, output)
        self.on_step(batch)
        return finished
