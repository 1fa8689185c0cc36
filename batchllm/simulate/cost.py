"""How long a step takes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.scheduler.batch import Batch
from batchllm.simulate.machine import Machine
from batchllm.simulate.shape import ModelShape

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a batch, by what takes them."""

    gemm: float
    head: float
    attention: float
    overhead: float

    @property
    def seconds(self) -> float:
        return self.gemm + self.head + self.attention + self.overhead


@dataclass(frozen=True, slots=True)
class StepWork:
    """What is in one step, in counts.

    `pairs` of query and key are those of prefill chunks and of shared segments, `decode_reads` the
    tokens of their own that decodes read, `num_segments` the chunks and segments of the former.
    """

    num_tokens: int
    num_samples: int
    pairs: int
    decode_reads: int
    num_segments: int


def work_of(batch: Batch) -> StepWork:
    """Count the (first) step of a batch."""
    decode = batch.chunks.count == 1
    own, shared = _pairs(batch)
    return StepWork(
        num_tokens=batch.num_tokens,
        num_samples=len(batch.samples),
        pairs=int(own[~decode].sum() + shared.sum()),
        decode_reads=int(own[decode].sum()),
        num_segments=int((~decode).sum()) + len(batch.shared),
    )


def _pairs(batch: Batch) -> tuple[Ints, Ints]:
    """Pairs of query and key: of each chunk with its own segment, and of each shared read."""
    chunks, shared = batch.chunks, batch.shared
    ends = np.concatenate([[0], np.cumsum(chunks.count)])
    queries = ends[shared.chunk_end] - ends[shared.chunk_begin]
    # A chunk's own tokens see half of each other, and all of what was there before.
    own = chunks.count * chunks.offset + chunks.count * (chunks.count + 1) // 2
    return own, queries * shared.length


class CostModel:
    """A step's time, from what is in the batch.

    The products of the body and of the head, each bound by arithmetic or by reading the weights;
    then attention, bound by arithmetic over all queries or by reading each segment once: segment by
    segment, or all together where one launch takes them all. One after the other, as engines that
    do not overlap kernels run them (NanoFlow does, and would come nearer to the bound).
    """

    def __init__(self, machine: Machine, shape: ModelShape) -> None:
        self._machine = machine
        self._shape = shape

    def cost(self, batch: Batch) -> StepCost:
        """The batch's cost, over all the steps it stands for."""
        machine, shape, steps = self._machine, self._shape, batch.num_steps
        num_tokens = batch.num_tokens
        num_samples = len(batch.samples)
        apart = machine.step_seconds + machine.token_seconds * num_tokens
        apart += machine.sample_seconds * num_samples
        return StepCost(
            gemm=steps * self.product(shape.body_parameters, num_tokens),
            head=steps * self.product(shape.head_parameters, num_samples),
            attention=self._attention(batch),
            overhead=steps * apart,
        )

    def product(self, parameters: int, num_tokens: int) -> float:
        """Seconds of `num_tokens` rows times `parameters` weights."""
        if num_tokens == 0:
            return 0.0
        machine = self._machine
        arithmetic = 2 * parameters * num_tokens / machine.gemm_rate(num_tokens)
        return max(arithmetic, parameters * self._shape.bytes_per_value / machine.bandwidth)

    def _attention(self, batch: Batch) -> float:
        """Over all the batch's steps; in each next one every decode has a token more to read."""
        machine, shape, steps = self._machine, self._shape, batch.num_steps
        chunks, shared = batch.chunks, batch.shared
        decode = chunks.count == 1
        own, shared_pairs = _pairs(batch)
        grown = (steps - 1) / 2  # in the mean step; with several, every chunk is a decode
        pair_seconds = shape.attention_flops / machine.attention_rate
        read_seconds = shape.kv_bytes_per_token / (machine.kv_bandwidth or machine.bandwidth)
        arithmetic = pair_seconds * np.concatenate([own + decode * grown, shared_pairs])
        reading = read_seconds * np.concatenate(
            [chunks.offset + chunks.count + decode * grown, shared.length]
        )
        apart = machine.segment_seconds * (int((~decode).sum()) + len(shared))
        if machine.one_attention_launch:
            return steps * (apart + max(float(arithmetic.sum()), float(reading.sum())))
        # A decode of its own is bound by reading, whatever its arithmetic would take alone.
        arithmetic[: len(chunks)][decode] = 0.0
        return steps * (apart + float(np.maximum(arithmetic, reading).sum()))
