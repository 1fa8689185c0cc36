"""Steps in two nano-batches: attention of one beside the products of the other."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from batchllm.attention.backend import AttentionBackend
from batchllm.runner.device import Device, SideStream
from batchllm.runner.fullest_steps import decodes_of
from batchllm.scheduler.batch import Batch
from batchllm.scheduler.split import NanoBatch

Ints = NDArray[np.int64]
Pays = Callable[[Batch], bool]
"""Whether a batch is faster in nano-batches."""

_RUNS_FIRST = 20  # until its kernels are tuned and it is recorded
_RUNS = 5
_TRIES = 3
_LEAST_GAIN = 0.02


@dataclass(slots=True)
class NanoBatching:
    """What runs steps in nano-batches, and which; `backend` has its share of the device."""

    backend: AttentionBackend
    stream: SideStream
    pays: Pays


def rows_in_order(halves: tuple[NanoBatch, NanoBatch]) -> Ints:
    """Where each of a step's samples is in the halves' hidden states, one half's behind the other.

    A half without samples has one row that nobody wants.
    """
    first, second = (half.sample for half in halves)
    rows = np.zeros(max(len(first) + len(second), 1), dtype=np.int64)
    rows[first] = np.arange(len(first))
    rows[second] = max(len(first), 1) + np.arange(len(second))
    return rows


def nano_batches_are_faster(
    submit: Callable[[Batch], object],
    nano_batching: NanoBatching,
    device: Device,
    max_num_seqs: int,
    num_blocks: int,
    block_size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> bool:
    """Try a step of decodes that read all of the KV, as many as may be, whole and in halves."""
    step = decodes_of(max_num_seqs, num_blocks, block_size)
    if step is None:
        return False
    before = nano_batching.pays
    seconds = {}
    for in_halves in (False, True):
        nano_batching.pays = partial(_always, in_halves)
        for _ in range(_RUNS_FIRST):
            submit(step)
        seconds[in_halves] = min(_time(submit, step, device, clock) for _ in range(_TRIES))
    nano_batching.pays = before
    return seconds[True] < seconds[False] * (1 - _LEAST_GAIN)


def _always(answer: bool, _: Batch) -> bool:
    return answer


def _time(
    submit: Callable[[Batch], object], step: Batch, device: Device, clock: Callable[[], float]
) -> float:
    device.synchronize()
    begin = clock()
    for _ in range(_RUNS):
        submit(step)
    device.synchronize()
    return clock() - begin
