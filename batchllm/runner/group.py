"""The processes that share a model, over torch.distributed: gloo on CPUs, NCCL on GPUs.

The group is one of its own, not torch's default one, so that several models may live in a process,
and a caller's own use of torch.distributed is left alone. They find each other by a file, and gloo
talks over the loopback interface, so it matters neither what the machine's name resolves to nor
what a firewall lets through.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from batchllm.errors import PeerLostError

# Longer than any step. Who is gone is noticed at once; this is for who hangs.
_PATIENCE = timedelta(minutes=10)
_MEETING = timedelta(minutes=1)  # everybody has started by then


class _Work(Protocol):
    def wait(self) -> bool: ...


class _Backend(Protocol):
    """What is used here of torch's `Backend`."""

    def allreduce(self, tensors: list[torch.Tensor]) -> _Work: ...

    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor) -> _Work: ...  # noqa: A002

    def abort(self) -> None: ...


class ProcessGroup:
    """See `Group` (models/parallel.py).

    Every call raises a `PeerLostError` once another process of the group is gone; but NCCL's wait
    for ever (`must_be_aborted`), until somebody who noticed calls `abort` from another thread.
    """

    def __init__(self, backend: _Backend, size: int, device: str) -> None:
        self.must_be_aborted = device == "cuda"
        self._backend = backend
        self._size = size
        self._device = device

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """See `Group`."""
        if x.numel():
            with _loss_told():
                self._backend.allreduce([x]).wait()
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """See `Group`."""
        rows = x.new_empty(self._size * len(x), *x.shape[1:])
        if x.numel():
            with _loss_told():
                self._backend._allgather_base(rows, x).wait()
        return rows.view(self._size, *x.shape)

    def least(self, count: int) -> int:
        """See `Group`."""
        return int(self.gather(torch.tensor([count], device=self._device)).min())

    def abort(self) -> None:
        """Let whoever waits in a call wait no longer."""
        self._backend.abort()


def connect(rank: int, size: int, meeting: Path, device: str) -> ProcessGroup:
    """Join the others; returns when all are there.

    Args:
        rank: which of them this is.
        size: how many they are.
        meeting: a file that only they know, not there yet.
        device: where the tensors will be, "cpu" or "cuda".

    Raises:
        PeerLostError: somebody did not come.
    """
    with _loss_told():
        store = dist.FileStore(str(meeting), size)  # type: ignore[attr-defined]
        return ProcessGroup(_BACKENDS[device](store, rank, size), size, device)


def _gloo(store: dist.Store, rank: int, size: int) -> _Backend:  # type: ignore[name-defined]
    store.set_timeout(_MEETING)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = _PATIENCE
    group: _Backend = dist.ProcessGroupGloo(store, rank, size, options)  # type: ignore
    return group


def _nccl(store: dist.Store, rank: int, size: int) -> _Backend:  # type: ignore[name-defined]
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _PATIENCE
    group: _Backend = dist.ProcessGroupNCCL(store, rank, size, options)  # type: ignore
    return group


_BACKENDS = {"cpu": _gloo, "cuda": _nccl}


@contextmanager
def _loss_told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(f"a process that shares the model is gone: {error}") from error
