"""The processes that share a model with this one: started, told what to do, and blamed."""

import os
import pickle
import select
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

from batchllm.cache.memory import ran_out_of_memory
from batchllm.child import Child, environ_with_gpus
from batchllm.config import EngineConfig
from batchllm.errors import BatchLLMError, PeerLostError, WorkerError
from batchllm.models.checkpoint import ModelSource
from batchllm.request import SamplingParams
from batchllm.runner.choose_device import check_gpus, choose_device
from batchllm.runner.group import ProcessGroup, connect
from batchllm.scheduler.batch import Batch

_MODULE = "batchllm.runner.tensor_worker"
_BLAME_SECONDS = 10.0  # from losing the connection to a worker's death or last message


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker is to be."""

    model: ModelSource
    config: EngineConfig
    max_model_len: int
    rank: int
    meeting: Path


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """From a worker: it can meet the others (0 blocks), or it has so much KV."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class Step:
    """To a worker: run this. The batch comes without `params`; None is the same as before."""

    batch: Batch
    params: list[SamplingParams] | None


@dataclass(frozen=True, slots=True)
class Shrink:
    """To a worker: go on with so many blocks."""

    num_blocks: int


class Workers:
    """All of them but this process, which is rank 0.

    Args:
        model: what they are to load.
        config: what this process goes by, too.
        max_model_len: the same.

    Raises:
        UsageError: there are fewer GPUs.
        WorkerError: one cannot be started.
    """

    def __init__(self, model: ModelSource, config: EngineConfig, max_model_len: int) -> None:
        self._size = config.tensor_parallel_size
        self._device = choose_device(config.device)
        check_gpus(self._device, self._size)
        same = replace(config, device=self._device)
        self._children: list[Child] = []
        self._has_lost = Event()
        self._params: list[SamplingParams] | None = None
        # It stays for as long as they do: who comes last still reads what the first has written.
        directory = TemporaryDirectory(prefix="batchllm-")
        self._meeting = Path(directory.name) / "meeting"
        self.close = weakref.finalize(self, _end, self._children, directory)
        try:
            for rank in range(1, self._size):
                environ = environ_with_gpus(os.environ, rank, 1)
                self._children.append(Child(_MODULE, f"tensor-parallel rank {rank}", environ))
                setup = WorkerSetup(model, same, max_model_len, rank, self._meeting)
                self._children[-1].send(setup)
        except BaseException:
            self.close()
            raise

    def join(self) -> ProcessGroup:
        """Meet them, when all are there.

        Raises:
            BatchLLMError: one cannot even start.
        """
        self.ready()
        return connect(0, self._size, self._meeting, self._device)

    def ready(self) -> list[int]:
        """Wait until all are; returns the blocks of each.

        Raises:
            BatchLLMError: one failed.
        """
        messages = [child.receive() for child in self._children]
        assert all(isinstance(message, WorkerReady) for message in messages), messages
        return [message.num_blocks for message in messages if isinstance(message, WorkerReady)]

    def run(self, batch: Batch) -> None:
        """Have all of them run a step.

        The parameters of a whole window can be many, and are the same from step to step.
        """
        params = batch.samples.params
        known, self._params = self._params, params
        light = replace(batch, samples=replace(batch.samples, params=[]))
        self.tell(Step(light, None if params is known else params))

    def tell(self, message: Step | Shrink) -> None:
        """Hand all of them a message.

        Raises:
            WorkerError: they have been ended.
        """
        if not self.close.alive:
            raise WorkerError("the model's processes have been ended, by an error or by `close`")
        pickled = pickle.dumps(message, protocol=5)
        for child in self._children:
            child.send_pickled(pickled)

    def abort_when_lost(self, group: ProcessGroup) -> None:
        """From now on, whoever waits for one that is gone waits no longer."""
        Thread(target=_watch, args=(self._children, group, self._has_lost), daemon=True).start()

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Within, all are in a step, which is the last if anything goes wrong: all are ended then.

        Raises:
            WorkerError: one of them is gone, or memory ran out in this process.
        """
        try:
            yield
            if self._has_lost.is_set():  # what the GPU was left with is no output
                raise PeerLostError("a process that shares the model is gone")
        except PeerLostError as error:
            reason = self.blame(error)
            self.close()
            raise reason from error
        except BaseException as error:  # the others wait in the middle of the step
            self.close()
            if ran_out_of_memory(error):
                raise WorkerError(
                    f"memory ran out in a step ({error}), which processes that share a model do "
                    "not recover from; give less with --kv-memory or --max-num-batched-tokens"
                ) from error
            raise

    def blame(self, error: PeerLostError) -> BatchLLMError:
        """Which was the first to go, and why."""
        deadline = time.monotonic() + _BLAME_SECONDS
        left = list(self._children)
        while left and time.monotonic() < deadline:
            for child in list(left):
                failure = child.failure()
                if isinstance(failure, PeerLostError):  # it was left alone, too
                    left.remove(child)
                elif failure is not None:
                    return failure
            time.sleep(0.01)
        return WorkerError(f"the model's processes have lost each other: {error}")


def _watch(children: Sequence[Child], group: ProcessGroup, has_lost: Event) -> None:
    """Abort the group when one ends, or says something, which is that it failed."""
    select.select(children, [], [])
    has_lost.set()
    group.abort()


def _end(children: Sequence[Child], directory: "TemporaryDirectory[str]") -> None:
    for child in children:
        child.close()
    directory.cleanup()
