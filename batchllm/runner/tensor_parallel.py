"""A model that several processes share: this one, which the scheduler is in, and its workers.

Before this process runs a step, it hands the batch to the workers, and all run it together; what is
sampled is everybody's, so nothing comes back. A batch is some kilobytes, and a pipe is the quickest
way for it to go: one system call a worker, and the worker waits in the other end's.

When a worker is gone the others cannot go on, and neither can this: a step raises why, and there is
no other after it. So it is when memory runs out in one of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from batchllm.config import EngineConfig
from batchllm.engine import AheadRunner, PendingStep
from batchllm.errors import PeerLostError
from batchllm.models.checkpoint import Checkpoint, ModelSource
from batchllm.models.parallel import Shard
from batchllm.runner.load import load_shard
from batchllm.runner.loaded import LoadedRunner, StepRunner
from batchllm.runner.workers import Shrink, Workers
from batchllm.scheduler.batch import Batch, StepOutput

Submit = Callable[[Batch], PendingStep]


class TensorParallelRunner:
    """Runs each step in all processes; nobody's but this one's output is looked at."""

    def __init__(self, runner: StepRunner, workers: Workers) -> None:
        self._runner = runner
        self._workers = workers

    def execute(self, batch: Batch) -> StepOutput:
        """Run one step.

        Raises:
            WorkerError: a worker is gone, or this process failed, and no step can be run any more.
        """
        with self._workers.in_step():
            self._workers.run(batch)
            return self._runner.execute(batch)

    def shrink(self, num_blocks: int) -> int:
        """Go on with `num_blocks` of KV, or as many as everybody has."""
        return _shrink(self._runner, self._workers, num_blocks)


class TensorParallelAheadRunner:
    """The same where steps can be given to a device that is still at the one before."""

    def __init__(self, runner: StepRunner, submit: Submit, workers: Workers) -> None:
        self._runner = runner
        self._submit = submit
        self._workers = workers

    def submit(self, batch: Batch) -> PendingStep:
        """Give all devices one step to do, behind those they have; see `execute`."""
        with self._workers.in_step():
            self._workers.run(batch)
            return _Pending(self._submit(batch), self._workers)

    def execute(self, batch: Batch) -> StepOutput:
        """See `TensorParallelRunner`."""
        return self.submit(batch).result()

    def shrink(self, num_blocks: int) -> int:
        """See `TensorParallelRunner`."""
        return _shrink(self._runner, self._workers, num_blocks)


@dataclass(frozen=True, slots=True)
class _Pending:
    here: PendingStep
    workers: Workers

    def result(self) -> StepOutput:
        with self.workers.in_step():
            return self.here.result()


def _shrink(runner: StepRunner, workers: Workers, num_blocks: int) -> int:
    counts = [num_blocks, 0]
    while len(set(counts)) > 1:
        workers.tell(Shrink(num_blocks))
        counts = [runner.shrink(num_blocks), *workers.ready()]
        num_blocks = min(counts)
    return num_blocks


def load_in_processes(
    checkpoint: Checkpoint, config: EngineConfig, max_model_len: int
) -> LoadedRunner:
    """Load a model into this process and its workers, a shard each.

    Raises:
        WorkerError: a worker failed.
    """
    workers = Workers(ModelSource.of(checkpoint), config, max_model_len)
    try:
        return _load_shared(checkpoint, config, max_model_len, workers)
    except PeerLostError as error:
        reason = workers.blame(error)
        workers.close()
        raise reason from error
    except BaseException:
        workers.close()
        raise


def _load_shared(
    checkpoint: Checkpoint, config: EngineConfig, max_model_len: int, workers: Workers
) -> LoadedRunner:
    group = workers.join()
    shard = Shard(0, config.tensor_parallel_size, group)
    loaded = load_shard(checkpoint, config, max_model_len, shard=shard)
    counts = [loaded.num_blocks, *workers.ready()]
    runner = _with_workers(loaded.runner, workers)
    num_blocks = min(counts)
    if num_blocks < max(counts):  # somebody did not get what all had agreed upon
        num_blocks = runner.shrink(num_blocks)
    if group.must_be_aborted:
        workers.abort_when_lost(group)
    kv_bytes = loaded.kv_bytes_per_token
    return replace(
        loaded,
        runner=runner,
        num_blocks=num_blocks,
        kv_bytes_per_token=None if kv_bytes is None else kv_bytes * shard.size,
        close=workers.close,
    )


def _with_workers(
    runner: StepRunner, workers: Workers
) -> TensorParallelRunner | TensorParallelAheadRunner:
    if isinstance(runner, AheadRunner):
        return TensorParallelAheadRunner(runner, runner.submit, workers)
    return TensorParallelRunner(runner, workers)
