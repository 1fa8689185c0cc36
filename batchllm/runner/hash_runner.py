"""The runner of the model `fake`: a step through a hash of the context, in array operations."""

import numpy as np
from numpy.typing import NDArray

from batchllm.request import TokenIds
from batchllm.runner.model_input import build_model_input
from batchllm.scheduler.batch import Batch, StepOutput

_BASE = 0x9E3779B97F4A7C15
_MIX = np.uint64(0xBF58476D1CE4E5B9)

Ints = NDArray[np.int64]
States = NDArray[np.uint64]


class HashRunner:
    """Answers with a hash of the whole context, carried along in the KV blocks.

    A slot of its "KV cache" holds the hash of all tokens up to the one written there: the sum of
    (token + 1) x base^position, modulo 2^64. A chunk goes on from the slot before its first token,
    in its own segment or at the end of the one above. So a block read wrongly or freed too early
    changes the answer, at a cost of a few operations a token. `FakeRunner` checks more, and slowly.

    Args:
        num_blocks: blocks of the cache.
        block_size: tokens of a block.
        max_model_len: longest context.
        answer_token_ids: what answers are drawn from, evenly.
    """

    def __init__(
        self, num_blocks: int, block_size: int, max_model_len: int, answer_token_ids: list[int]
    ) -> None:
        self._block_size = block_size
        self.shrink(num_blocks)
        self._powers: States = np.full(max_model_len, _BASE, dtype=np.uint64).cumprod()
        self._answers: TokenIds = np.array(answer_token_ids, dtype=np.int32)

    def execute(self, batch: Batch) -> StepOutput:
        """Run one step."""
        step = build_model_input(batch, self._block_size)
        counts = batch.chunks.count
        begin = np.cumsum(counts) - counts
        terms = (step.token_ids.astype(np.uint64) + np.uint64(1)) * self._powers[step.positions]
        sums: States = np.concatenate([np.zeros(1, dtype=np.uint64), terms.cumsum()])
        sources = self._sources(batch)
        left = np.arange(len(counts))
        self._is_due[step.slots] = True
        while len(left):  # what a chunk goes on from may be computed in this very step
            is_ready = (sources[left] < 0) | ~self._is_due[sources[left]]
            ready, left = left[is_ready], left[~is_ready]
            assert len(ready), "chunks go on from each other in a circle"
            count = counts[ready]
            tokens = _spans(begin[ready], count)
            states = np.where(sources[ready] < 0, np.uint64(0), self._states[sources[ready]])
            slots = step.slots[tokens]
            self._states[slots] = sums[tokens + 1] + (states - sums[begin[ready]]).repeat(count)
            self._is_due[slots] = False
        mixed = self._states[step.slots[step.sample_rows]]
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX
        mixed ^= mixed >> np.uint64(27)
        return StepOutput(self._answers[mixed % np.uint64(len(self._answers))])

    def shrink(self, num_blocks: int) -> int:
        """Go on with `num_blocks` of KV; all that is held is lost."""
        self._states: States = np.zeros(num_blocks * self._block_size, dtype=np.uint64)
        self._is_due = np.zeros(num_blocks * self._block_size, dtype=np.bool_)  # in this step
        return num_blocks

    def _sources(self, batch: Batch) -> Ints:
        """The slot that each chunk goes on from, [num_chunks]; -1 where it begins its prompt."""
        chunks, shared = batch.chunks, batch.shared
        table = np.arange(len(chunks))
        last = chunks.offset - 1
        # Of a segment's first token: in the shared segment that ends where it starts.
        readers = _spans(shared.chunk_begin, shared.chunk_end - shared.chunk_begin)
        read = np.arange(len(shared)).repeat(shared.chunk_end - shared.chunk_begin)
        is_above = (shared.start + shared.length)[read] == (chunks.start - chunks.offset)[readers]
        readers, read = readers[is_above], read[is_above]
        first = last[readers] < 0
        readers, read = readers[first], read[first]
        table[readers], last[readers] = len(chunks) + read, shared.length[read] - 1
        assert ((last >= 0) | (chunks.start == 0)).all(), "a chunk goes on from nowhere"
        blocks = batch.tables[table, np.maximum(last, 0) // self._block_size].astype(np.int64)
        return np.where(last < 0, -1, blocks * self._block_size + last % self._block_size)


def _spans(begin: Ints, count: Ints) -> Ints:
    """The numbers `begin[i]` to `begin[i] + count[i]`, one span behind the other."""
    first = begin - (np.cumsum(count) - count)
    return np.repeat(first, count) + np.arange(int(count.sum()))
