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
    then attention, each segment bound by arithmetic over all its queries or by reading it once;
    one after the other, as engines that do not overlap kernels run them (NanoFlow does, and would
    come nearer to the bound).
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
        chunks, shared, steps = batch.chunks, batch.shared, batch.num_steps
        ends = np.concatenate([[0], np.cumsum(chunks.count)])
        queries = ends[shared.chunk_end] - ends[shared.chunk_begin]
        # A chunk's own tokens see half of each other, and all of what was there before.
        pairs = chunks.count * chunks.offset + chunks.count * (chunks.count + 1) // 2
        once = self._reads(queries * shared.length, shared.length).sum()
        first = self._reads(pairs, chunks.offset + chunks.count).sum()
        if steps == 1:
            return float(once + first)
        growth = self._reads(np.array(1), np.array(1)) * len(chunks) * steps * (steps - 1) / 2
        return float(steps * (once + first) + growth)

    def _reads(self, pairs: np.ndarray, tokens: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        """Seconds of segments with `pairs` of query and key, and `tokens` to read."""
        machine, shape = self._machine, self._shape
        arithmetic = pairs * (shape.attention_flops / machine.attention_rate)
        reading = tokens * (shape.kv_bytes_per_token / machine.bandwidth)
        return np.maximum(arithmetic, reading)
