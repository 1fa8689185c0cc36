"""The loop: schedule, execute, update; with a runner that can be ahead, the last one step later."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, runtime_checkable

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


class PendingStep(Protocol):
    """A step that was submitted."""

    def result(self) -> StepOutput:
        """Wait until the step has ended; what it sampled, or the error that it met."""
        ...


@runtime_checkable
class AheadRunner(Protocol):
    """Takes a step while the one before it still runs."""

    def submit(self, batch: Batch) -> PendingStep:
        """Start a step, to be executed after those that were submitted before.

        It takes its `carried` tokens from the step before it, whose result nobody has asked for
        then. If that one meets an error, so does this one.
        """
        ...


class Engine:
    """Answers a planned window, step by step.

    If the runner can be ahead, the next step is submitted before the result of the one that runs
    is waited for. No step runs any more when `steps` has ended, however it does.
    """

    def __init__(
        self,
        scheduler: StepScheduler,
        runner: Runner | AheadRunner,
        *,
        before_step: Callable[[Batch], None] = lambda batch: None,
        on_step: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self.scheduler = scheduler
        self.before_step = before_step
        self.on_step = on_step
        self._is_ahead = isinstance(runner, AheadRunner)
        self._runner = runner if isinstance(runner, AheadRunner) else _AtOnce(runner)
        self._submitted: deque[tuple[Batch, PendingStep]] = deque()  # two at most

    def run(self, plan: PrefixPlan) -> Iterator[FinishedSequence]:
        """Yield each of the plan's sequences when it is finished, in the order of finishing."""
        return chain.from_iterable(self.steps(plan))

    def steps(self, plan: PrefixPlan) -> Generator[list[FinishedSequence], None, None]:
        """Yield, after each step, the sequences it finished; first those that cannot be run."""
        yield self.scheduler.add(plan)
        try:
            while self.scheduler.has_unfinished or self._submitted:
                yield self.step()
        finally:
            self._discard()

    def step(self) -> list[FinishedSequence]:
        """One forward pass; returns the sequences it finished.

        Raises:
            OutOfMemoryError: the runner had none for it; the sequences are lost to the scheduler.
        """
        if not self._submitted:
            self._submit()
        batch, pending = self._submitted[0]
        if self._is_ahead:
            self.scheduler.expect(batch)
            if self.scheduler.has_work:
                self._submit()
        with _memory_for(batch):
            output = pending.result()
        self._submitted.popleft()
        finished = self.scheduler.update(batch, output)
        self.on_step(batch)
        return finished

    def _submit(self) -> None:
        batch = self.scheduler.schedule()
        self.before_step(batch)
        with _memory_for(batch):
            self._submitted.append((batch, self._runner.submit(batch)))

    def _discard(self) -> None:
        """Wait for the steps nobody asks about any more: the KV is not theirs to write then."""
        for _, pending in self._submitted:
            with suppress(Exception):
                pending.result()
        self._submitted.clear()


@contextmanager
def _memory_for(batch: Batch) -> Iterator[None]:
    """Tell an error for want of memory from others."""
    try:
        yield
    except Exception as error:
        if ran_out_of_memory(error):
            raise OutOfMemoryError(f"a step of {batch.num_tokens:,} tokens: {error}") from error
        raise


class _AtOnce:
    """A runner that cannot be ahead, for a caller that does not care: a step ends as it starts."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def submit(self, batch: Batch) -> PendingStep:
        return _Ended(self._runner.execute(batch))


@dataclass(frozen=True, slots=True)
class _Ended:
    output: StepOutput

    def result(self) -> StepOutput:
        return self.output
