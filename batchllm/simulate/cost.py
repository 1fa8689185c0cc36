"""How long a step takes."""

from dataclasses import dataclass

import numpy as np

from batchllm.scheduler.batch import Batch
from batchllm.simulate.machine import Machine
from batchllm.simulate.shape import ModelShape


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
        return StepCost(
            gemm=steps * self._product(shape.body_parameters, batch.num_tokens),
            head=steps * self._product(shape.head_parameters, len(batch.samples)),
            attention=self._attention(batch),
            overhead=steps * (machine.step_seconds + machine.token_seconds * batch.num_tokens),
        )

    def _product(self, parameters: int, num_tokens: int) -> float:
        if num_tokens == 0:
            return 0.0
        machine = self._machine
        arithmetic = 2 * parameters * num_tokens / machine.gemm_rate(num_tokens)
        return max(arithmetic, parameters * self._shape.bytes_per_value / machine.bandwidth)

    def _attention(self, batch: Batch) -> float:
        """Over all the batch's steps; in each next one every chunk has a token more to read."""
        machine, shape, steps = self._machine, self._shape, batch.num_steps
        chunks, shared = batch.chunks, batch.shared
        ends = np.concatenate([[0], np.cumsum(chunks.count)])
        queries = ends[shared.chunk_end] - ends[shared.chunk_begin]
        # A chunk's own tokens see half of each other, and all of what was there before.
        own = chunks.count * chunks.offset + chunks.count * (chunks.count + 1) // 2
        pairs = np.concatenate([own, queries * shared.length])
        tokens = np.concatenate([chunks.offset + chunks.count, shared.length])
        arithmetic = pairs * (shape.attention_flops / machine.attention_rate)
        reading = tokens * (shape.kv_bytes_per_token / machine.bandwidth)
        grown = np.zeros(len(pairs))
        if steps > 1:  # then every chunk is a decode, and the mean step has this much more
            grown[: len(chunks)] = (steps - 1) / 2
        arithmetic += grown * (shape.attention_flops / machine.attention_rate)
        reading += grown * (shape.kv_bytes_per_token / machine.bandwidth)
        if machine.one_attention_launch:
            return steps * max(float(arithmetic.sum()), float(reading.sum()))
        return steps * float(np.maximum(arithmetic, reading).sum())
