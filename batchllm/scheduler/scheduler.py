"""The scheduler: from a plan to one batch a step."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from batchllm.cache.block_pool import BlockPool
from batchllm.prefix.plan import PrefixPlan
from batchllm.request import FinishReason
from batchllm.scheduler.build import build_sequences
from batchllm.scheduler.lengths import LengthEstimator
from batchllm.scheduler.projection import Projection, first_sample_steps
from batchllm.scheduler.state import Batch, Chunk, Node, Sample, Segment, Sequence, StepOutput


@dataclass(slots=True)
class SchedulerStats:
    """What the scheduler did, in tokens and events; adds up over windows.

    `computed_prompt_tokens` is all work on prompts, repeats after preemption included;
    `recomputed_tokens` is what was repeated, of prompts and of answers.
    """

    steps: int = 0
    computed_prompt_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0

    def since(self, before: "SchedulerStats") -> "SchedulerStats":
        """What was added since a copy was taken."""
        return SchedulerStats(
            self.steps - before.steps,
            self.computed_prompt_tokens - before.computed_prompt_tokens,
            self.recomputed_tokens - before.recomputed_tokens,
            self.preemptions - before.preemptions,
        )


class Scheduler:
    """Hands out prefill chunks and decodes, mixed, as memory allows.

    Idea: admit a sequence when the blocks that all admitted sequences will hold, simulated to each
    one's expected end, stay within the pool; every step then takes all decodes and fills the rest
    of its token budget with prefill, in admission order. A sequence's shared nodes are computed on
    its way, once; they are freed when the last sequence below them finishes.

    When memory runs out all the same (an answer was longer than expected), first nodes that no
    admitted sequence needs are dropped, longest unneeded first; then the sequence admitted last
    gives its private blocks back and waits at the head of the queue with the tokens it has. The
    sequence admitted first is never preempted, so there is always progress.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_model_len: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.pool = pool
        self.stats = SchedulerStats()
        self._max_model_len = max_model_len
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._eos_token_ids = eos_token_ids
        self._lengths = LengthEstimator()
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}  # by leaf, in order of admission
        self._idle: dict[int, Node] = {}  # by order: KV that only waiting sequences need
        self._admission_open = True  # something changed since the queue's head did not fit

    def add(self, plan: PrefixPlan) -> list[Sequence]:
        """Queue a window; the last one must be finished.

        Returns its sequences, one a leaf. One that could not run even alone in the pool is not
        queued: its `finish_reason` is "error".
        """
        assert not self.has_unfinished, "one window at a time"
        sequences = build_sequences(plan, self._max_model_len)
        for leaf in plan.leaf_order.tolist():
            sequence = sequences[leaf]
            if self.blocks_alone(sequence) <= self.pool.num_blocks:
                self._waiting.append(sequence)
            else:
                self._finish(sequence, "error")
        self._admission_open = True
        return sequences

    def blocks_alone(self, sequence: Sequence) -> int:
        """Blocks the sequence needs to run to its longest end, with nothing else in the pool."""
        longest = len(sequence.tail_token_ids) + sequence.max_tokens - 1
        shared = sum(self.pool.blocks_for(n.num_tokens) for n in sequence.path)
        return shared + self.pool.blocks_for(longest)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def schedule(self) -> Batch:
        """Admit what fits and choose the next step's tokens; never empty while work is left."""
        self._admit()
        chunks = self._decodes()
        num_decodes = len(chunks)
        chunks += self._prefills(self._max_num_batched_tokens - num_decodes)
        while not chunks:
            self._preempt_last()
            chunks = self._prefills(self._max_num_batched_tokens)
        chunks.sort(key=_depth_first)
        self.stats.steps += 1
        return Batch(chunks, sum(len(c.token_ids) for c in chunks), num_decodes)

    def update(self, batch: Batch, output: StepOutput) -> list[Sequence]:
        """Append the sampled tokens; returns the sequences that are finished by them."""
        finished = []
        sampled = (c.sample for c in batch.chunks if c.sample is not None)
        for sample, token in zip(sampled, output.token_ids, strict=True):
            sequence = self._running[sample.leaf]
            sequence.output_token_ids.append(token)
            learns = not sequence.sampling_params.ignore_eos
            num_output_tokens = len(sequence.output_token_ids)
            reason: FinishReason
            if learns and token in self._eos_token_ids:
                reason = "stop"
            elif num_output_tokens >= sequence.max_tokens:
                reason = "length"
            else:
                continue
            if learns:
                self._lengths.observe(num_output_tokens, sequence.max_tokens)
            del self._running[sample.leaf]
            self._release(sequence)
            self._finish(sequence, reason)
            finished.append(sequence)
        return finished

    # Admission

    def _admit(self) -> None:
        """Admit from the queue's head: one, then twice as many, as long as the projection fits."""
        count = 1
        while self._admission_open and self._waiting:
            count = min(count, len(self._waiting), self._max_num_seqs - len(self._running))
            if count <= 0:
                return
            if self._fits(count):
                for _ in range(count):
                    self._admit_next()
                count *= 2
            elif count > 1:
                count //= 2
            else:
                self._admission_open = False
        if not self._running:  # the head alone fits the pool, whatever lies idle in it
            self._admit_next()

    def _admit_next(self) -> None:
        sequence = self._waiting.popleft()
        self._running[sequence.leaf] = sequence
        for node in sequence.path:
            node.num_running += 1
            self._idle.pop(node.order, None)

    def _fits(self, count: int) -> bool:
        candidates = [self._waiting[i] for i in range(count)]
        sequences = [*self._running.values(), *candidates]
        return self._project(sequences).peak_blocks(self.pool.block_size) <= self.pool.num_blocks

    def _project(self, sequences: list[Sequence]) -> Projection:
        """Expected memory of `sequences`, in order of admission, and of their nodes."""
        prefill, remaining = [], []
        nodes: dict[int, Node] = {}
        users: dict[int, list[int]] = {}  # by order of the node: which of `sequences`
        for index, sequence in enumerate(sequences):
            tokens = 0 if sequence.decoding else sequence.num_pending_tokens
            for node in sequence.path:
                if node.order not in nodes:
                    nodes[node.order] = node
                    users[node.order] = []
                    tokens += node.num_tokens - node.segment.num_computed_tokens
                users[node.order].append(index)
            prefill.append(tokens)
            remaining.append(
                self._lengths.remaining(
                    len(sequence.output_token_ids),
                    sequence.max_tokens,
                    ignore_eos=sequence.sampling_params.ignore_eos,
                )
            )
        left = np.array(remaining, dtype=np.int64)
        start = first_sample_steps(
            np.array(prefill, dtype=np.int64), left, self._max_num_batched_tokens
        )
        finish = start + left
        forever = np.iinfo(np.int64).max
        return Projection(
            private_tokens=np.array([s.num_private_tokens for s in sequences], dtype=np.int64),
            start=start,
            remaining=left,
            node_blocks=np.array(
                [self.pool.blocks_for(n.num_tokens) for n in nodes.values()], dtype=np.int64
            ),
            node_until=np.array(
                [
                    finish[users[order]].max() if len(users[order]) == n.num_unfinished else forever
                    for order, n in nodes.items()
                ],
                dtype=np.int64,
            ),
        )

    # One step's chunks

    def _decodes(self) -> list[Chunk]:
        chosen: dict[int, Sequence] = {}
        for sequence in [s for s in self._running.values() if s.decoding]:
            while sequence.leaf in self._running and not self._grow(sequence.segment, 1):
                preempted = self._preempt_last()
                if preempted.leaf in chosen:
                    del chosen[preempted.leaf]
            if sequence.leaf in self._running:
                chosen[sequence.leaf] = sequence
        return [self._sequence_chunk(s, 1) for s in chosen.values()]

    def _prefills(self, budget: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for sequence in self._running.values():
            if budget <= 0:
                break
            if sequence.num_pending_tokens == 0 or sequence.decoding:
                continue
            taken = self._prefill(sequence, budget)
            chunks += taken
            budget -= sum(len(c.token_ids) for c in taken)
        return chunks

    def _prefill(self, sequence: Sequence, budget: int) -> list[Chunk]:
        """The next chunks towards the sequence's first token: its missing nodes, then its own."""
        chunks: list[Chunk] = []
        for node in sequence.path:
            if node.complete:
                continue
            count = min(budget, node.num_tokens - node.segment.num_computed_tokens)
            if count == 0 or not self._grow(node.segment, count):
                return chunks
            chunks.append(self._node_chunk(node, sequence, count))
            budget -= count
            if not node.complete:
                return chunks
        count = min(budget, sequence.num_pending_tokens)
        if count > 0 and self._grow(sequence.segment, count):
            chunks.append(self._sequence_chunk(sequence, count))
        return chunks

    def _node_chunk(self, node: Node, sequence: Sequence, count: int) -> Chunk:
        offset = node.segment.num_computed_tokens
        self._account(node.segment, sequence, count, node.num_tokens)
        return Chunk(
            order=node.order,
            token_ids=node.token_ids[offset : offset + count],
            start=node.segment.start + offset,
            offset=offset,
            block_ids=node.segment.block_ids,
            path=node.path[:-1],
            sample=None,
        )

    def _sequence_chunk(self, sequence: Sequence, count: int) -> Chunk:
        segment = sequence.segment
        offset = segment.num_computed_tokens
        self._account(segment, sequence, count, len(sequence.tail_token_ids))
        sample = None
        if sequence.num_pending_tokens == 0:
            sample = Sample(
                sequence.leaf,
                sequence.row_index,
                len(sequence.output_token_ids),
                sequence.sampling_params,
            )
        return Chunk(
            order=sequence.order,
            token_ids=sequence.private_tokens(offset, offset + count),
            start=segment.start + offset,
            offset=offset,
            block_ids=segment.block_ids,
            path=sequence.path,
            sample=sample,
        )

    def _account(self, segment: Segment, sequence: Sequence, count: int, num_prompt: int) -> None:
        """Mark `count` more tokens computed; the segment's first `num_prompt` are a prompt's."""
        begin = segment.num_computed_tokens
        end = begin + count
        fresh = max(begin, segment.high_water)  # below it is repetition
        sequence.num_fresh_prompt_tokens += max(0, min(end, num_prompt) - fresh)
        self.stats.computed_prompt_tokens += max(0, min(end, num_prompt) - begin)
        self.stats.recomputed_tokens += min(end, fresh) - begin
        segment.num_computed_tokens = end
        segment.high_water = max(segment.high_water, end)

    # Memory

    def _grow(self, segment: Segment, count: int) -> bool:
        """Give the segment blocks for `count` more tokens, dropping idle nodes if need be."""
        wanted = self.pool.blocks_for(segment.num_computed_tokens + count)
        missing = wanted - len(segment.block_ids)
        while self.pool.num_free < missing and self._idle:
            self._drop(self._least_needed())
        if self.pool.num_free < missing:
            return False
        segment.block_ids.extend(self.pool.allocate(missing))
        return True

    def _least_needed(self) -> Node:
        """The idle node unneeded for longest, those of the queue's head last."""
        next_up = self._waiting[0].path if self._waiting else ()
        return next((n for n in self._idle.values() if n not in next_up), self._first_idle())

    def _first_idle(self) -> Node:
        return next(iter(self._idle.values()))

    def _drop(self, node: Node) -> None:
        del self._idle[node.order]
        self._free(node.segment)

    def _free(self, segment: Segment) -> None:
        self.pool.free(segment.block_ids)
        segment.block_ids = []
        segment.num_computed_tokens = 0

    def _preempt_last(self) -> Sequence:
        sequence = self._running.popitem()[1]
        assert self._running, f"leaf {sequence.leaf} alone does not fit the pool"
        self.stats.preemptions += 1
        self._release(sequence)
        self._waiting.appendleft(sequence)
        self._admission_open = False
        return sequence

    def _release(self, sequence: Sequence) -> None:
        """The sequence stops running: its private blocks go back, its nodes may fall idle."""
        self._free(sequence.segment)
        self._admission_open = True
        for node in sequence.path:
            node.num_running -= 1
            if node.num_running == 0 and node.segment.block_ids:
                self._idle[node.order] = node

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        for node in sequence.path:
            node.num_unfinished -= 1
            if node.num_unfinished == 0 and node.order in self._idle:
                self._drop(node)


def _depth_first(chunk: Chunk) -> int:
    return chunk.order
