"""The scheduler: from a plan to one batch a step."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from batchllm.cache.block_pool import BlockPool
from batchllm.cache.block_table import BlockTables
from batchllm.prefix.plan import PrefixPlan
from batchllm.request import FinishReason, TokenIds
from batchllm.scheduler.admission import Candidates, find_candidates
from batchllm.scheduler.assemble import Work, assemble
from batchllm.scheduler.base import SchedulerStats
from batchllm.scheduler.batch import Batch, FinishedSequence, StepOutput
from batchllm.scheduler.idle import IdleNodes
from batchllm.scheduler.lengths import Expectation, LengthEstimator
from batchllm.scheduler.projection import Projection
from batchllm.scheduler.queue import AdmissionQueue
from batchllm.scheduler.state import NOBODY, ChildCount, Segments
from batchllm.scheduler.timeline import first_sample_step

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_NONE: Ints = np.zeros(0, dtype=np.int64)


class Scheduler:
    """Hands out prefill chunks and decodes, mixed, as memory allows.

    Idea: every step takes all decodes and fills the rest of its token budget with prefill. When
    that needs another sequence, it is admitted if the blocks that all admitted sequences will
    hold, projected to each one's expected end, stay within the pool, with something to spare where
    lengths are not known. A sequence's shared nodes
    are computed on its way, once; they are freed when the last sequence below them finishes.

    When memory runs out all the same (an answer was longer than expected), first nodes that no
    admitted sequence needs are dropped, longest unneeded first; then the sequence admitted last
    gives its private blocks back and waits at the head of the queue with the tokens it has. The
    sequence admitted first is never preempted, so there is always progress.

    A window's state is arrays over its segments, and a step is a few operations on those that
    take part, so that thousands of sequences cost little more than ten.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_model_len: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        eos_token_ids: frozenset[int] = frozenset(),
        lengths: LengthEstimator | None = None,
    ) -> None:
        self.pool = pool
        self.stats = SchedulerStats()
        self.lengths = lengths or LengthEstimator()
        self._max_model_len = max_model_len
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._eos_token_ids = eos_token_ids
        self._queue = AdmissionQueue(_NONE)
        self._decoding = _NONE  # sequences, ascending
        self._work = _NONE  # segments of admitted sequences to prefill, in order
        self._num_running = 0

    def add(self, plan: PrefixPlan) -> list[FinishedSequence]:
        """Queue a window; the last one must be finished.

        Returns the sequences that could not run even alone in the pool, with the reason "error".
        """
        assert not self.has_unfinished, "one window at a time"
        state = self._state = Segments(plan, self._max_model_len)
        self._tables = BlockTables(self.pool, state.count)
        self._projection = Projection(state, self.pool.block_size)
        self._unfinished = ChildCount(state.parent, state.of_leaf)
        self._running = ChildCount(state.parent)
        self._nodes = _NONE  # those above running sequences, ascending
        self._idle = IdleNodes(state, self._tables, self.pool)
        self._admitted: Ints = np.zeros(state.count, dtype=np.int64)  # a running number
        self._deviation: Floats = np.zeros(state.count)  # of the expected lengths
        self._num_admitted = 0
        self._admission_open = True  # something changed since the queue's head did not fit
        order = state.of_leaf[plan.leaf_order]
        fits = self._blocks_alone(order) <= self.pool.num_blocks
        self._queue = AdmissionQueue(order[fits])
        failed = order[~fits]
        self._projection.give_up(failed)
        self._unfinished.remove(failed)
        return [self._finished(int(s), "error") for s in failed]

    def blocks_alone(self, leaf: int) -> int:
        """Blocks a leaf's sequence needs to its longest end, with nothing else in the pool."""
        return int(self._blocks_alone(self._state.of_leaf[leaf : leaf + 1])[0])

    @property
    def has_unfinished(self) -> bool:
        return bool(len(self._queue) or self._num_running)

    @property
    def peak_kv_blocks(self) -> int:
        """The most blocks that were ever held at once."""
        return self.pool.peak_used

    def schedule(self, ends: Ints | None = None) -> Batch:
        """Admit what fits and choose the next step's tokens; see `StepScheduler`."""
        self._revise_overdue()
        decodes = self._grow_decodes()
        work = self._prefill(self._max_num_batched_tokens - len(decodes))
        while len(decodes) == 0 and len(work.segments) == 0:
            self._preempt_last()
            work = self._prefill(self._max_num_batched_tokens)
        segments = np.concatenate([decodes, work.segments])
        order = np.argsort(segments)
        everything = Work(
            segments[order],
            np.concatenate([np.ones_like(decodes), work.counts])[order],
            np.concatenate([np.ones(len(decodes), dtype=np.bool_), work.samples])[order],
        )
        state = self._state
        offset = state.num_computed[everything.segments]
        tables = self._tables if ends is None else None  # a simulation moves no data
        batch = assemble(state, tables, self._nodes, everything, offset, len(decodes))
        prompt_tokens, repeated = state.account(everything.segments, everything.counts)
        self.stats.computed_prompt_tokens += prompt_tokens
        self.stats.recomputed_tokens += repeated
        self.stats.steps += 1
        if ends is not None and len(work.segments) == 0 and len(self._work) == 0:
            left = ends[state.leaf[decodes]] - state.num_outputs[decodes]
            return self._repeat(batch, decodes, int(left.min()))
        return batch

    def update(self, batch: Batch, output: StepOutput) -> list[FinishedSequence]:
        """Append the sampled tokens; returns the sequences that are finished by them."""
        state, projection = self._state, self._projection
        projection.advance(batch.num_steps)
        sequences, steps = batch.samples.sequence, batch.num_steps
        position = state.num_outputs[sequences] + steps - 1
        state.outputs.put(sequences, position, output.token_ids)
        state.num_outputs[sequences] = position + 1
        ignore_eos = state.ignore_eos[sequences]
        stopped = ~ignore_eos & self._ends(output.token_ids)
        done = stopped | (position + 1 >= state.max_tokens[sequences])
        # The first sample of what took longer or shorter to prefill than expected.
        surprised = ~done & (projection.start[sequences] >= projection.now)
        self._decoding = sequences[~done]
        self._revise(sequences[surprised])
        ended = sequences[done]
        if len(ended) == 0:
            return []
        learned = ended[~ignore_eos[done]]
        if len(learned):
            self.lengths.observe(state.num_outputs[learned], state.max_tokens[learned])
        projection.remove(ended)
        self._release(ended)
        self._drop_finished(self._unfinished.remove(ended))
        return [
            self._finished(sequence, "stop" if stop else "length")
            for sequence, stop in zip(ended.tolist(), stopped[done].tolist(), strict=True)
        ]

    def check(self) -> None:
        """Assert the books of pool, nodes and projection (for tests)."""
        state = self._state
        self.pool.check(self._tables.held())
        held = -(-state.num_computed // self.pool.block_size)
        assert np.array_equal(self._tables.num_held, held), "blocks do not match tokens"
        waiting = self._queue.peek(len(self._queue))
        running = np.concatenate([self._decoding, self._work[self._leaves(self._work)]])
        assert len(running) == self._num_running
        now, left = self._running, self._unfinished
        assert np.array_equal(now.children, ChildCount(state.parent, running).children)
        everyone = np.concatenate([running, waiting])
        assert np.array_equal(left.children, ChildCount(state.parent, everyone).children)
        needed = np.flatnonzero(now.children)
        assert np.array_equal(self._nodes, needed)
        nodes = np.flatnonzero((state.leaf == NOBODY) & (state.num_computed > 0))
        assert set(self._idle) == set(nodes.tolist()) - set(needed.tolist())
        self._projection.check(running, needed)

    # Admission

    def _admit(self, room: int) -> None:
        """Admit from the queue's head as long as a step has `room` tokens and memory fits."""
        while room > 0 and self._admission_open and len(self._queue):
            places = self._max_num_seqs - self._num_running
            if places <= 0:
                return
            candidates = find_candidates(
                self._state, self._running, self._queue.peek(min(places, room)), room
            )
            start, expected = self._expect(candidates, room)
            finish = start + expected.tokens - 1
            count = self._how_many_fit(candidates, start, finish, expected.deviation)
            if count < len(candidates.sequences):
                self._admission_open = False
            if count == 0 and self._num_running == 0:
                count = 1  # the head alone fits the pool, whatever lies idle in it
            if count:
                admitted = candidates.take(count)
                self._deviation[admitted.sequences] = expected.deviation[:count]
                self._start(admitted, start[:count], finish[:count])
                room -= int(admitted.tokens.sum())

    def _expect(self, candidates: Candidates, room: int) -> tuple[Ints, Expectation]:
        """In which step each candidate samples first, and how many tokens from then on."""
        now = self._projection.now
        start = np.full(len(candidates.sequences), now)
        remaining = self._remaining(candidates.sequences)
        over = int(candidates.tokens.sum()) - room
        if over > 0:  # the last one takes more than this step
            others = np.concatenate([self._decoding, self._work[self._leaves(self._work)]])
            finishes = np.concatenate(
                [self._projection.finish[others], (start + remaining.tokens - 1)[:-1]]
            )
            start[-1] = first_sample_step(over, finishes, self._max_num_batched_tokens, now)
        return start, remaining

    def _how_many_fit(
        self, candidates: Candidates, start: Ints, finish: Ints, deviation: Floats
    ) -> int:
        """The most candidates whose projected peak stays within the pool.

        The lengths of many answers add up to about their expectation, give or take the root of
        their summed variances: twice that is left free, so that a preemption is the exception.
        """
        running = np.concatenate([self._decoding, self._work[self._leaves(self._work)]])
        variance = np.cumsum(deviation**2) + (self._deviation[running] ** 2).sum()
        spare = 2 * np.sqrt(variance) / self.pool.block_size
        fitting, failing = 0, len(candidates.sequences) + 1
        tried = len(candidates.sequences)
        while failing - fitting > 1:
            some = candidates.take(tried)
            peak = self._projection.peak_with(
                some.sequences, start[:tried], finish[:tried], some.nodes
            )
            if peak + spare[tried - 1] <= self.pool.num_blocks:
                fitting = tried
            else:
                failing = tried
            tried = (fitting + failing) // 2
        return fitting

    def _start(self, admitted: Candidates, start: Ints, finish: Ints) -> None:
        sequences = admitted.sequences
        self._queue.pop(len(sequences))
        self._num_running += len(sequences)
        self._admitted[sequences] = self._num_admitted + np.arange(len(sequences))
        self._num_admitted += len(sequences)
        self._state.owner[admitted.nodes] = sequences[admitted.first]
        self._projection.admit(sequences, start, finish, admitted.nodes)
        needed = self._running.add(sequences)
        assert len(needed) == len(admitted.nodes)
        self._nodes = np.sort(np.concatenate([self._nodes, needed]))
        self._idle.remove(needed)
        self._work = np.concatenate([self._work, admitted.work(self._state)])

    def _remaining(self, sequences: Ints) -> Expectation:
        state = self._state
        return self.lengths.remaining(
            state.num_outputs[sequences], state.max_tokens[sequences], state.ignore_eos[sequences]
        )

    def _revise_overdue(self) -> None:
        """Expect more of decodes that should have finished by now."""
        overdue = self._projection.finish[self._decoding] < self._projection.now
        if overdue.any():
            self._revise(self._decoding[overdue])

    def _revise(self, sequences: Ints) -> None:
        if len(sequences):
            now = np.full(len(sequences), self._projection.now)
            expected = self._remaining(sequences)
            self._deviation[sequences] = expected.deviation
            self._projection.revise(sequences, now, now + expected.tokens - 1)

    # One step's tokens

    def _grow_decodes(self) -> Ints:
        """Give all decodes room for a token, preempting until there is enough."""
        while True:
            decodes = self._decoding
            full = decodes[self._state.num_computed[decodes] % self.pool.block_size == 0]
            if self._reclaim(len(full)):
                break
            self._preempt_last()
        self._tables.grow(full, self._tables.num_held[full] + 1)
        return decodes

    def _prefill(self, room: int) -> Work:
        """Take up to `room` tokens of prefill, admitting for it, and give them blocks."""
        state = self._state
        backlog = int(state.pending(self._work).sum())
        if backlog < room:
            self._admit(room - backlog)
        if room <= 0 or len(self._work) == 0:
            return Work(_NONE, _NONE, np.zeros(0, dtype=np.bool_))
        pending = state.pending(self._work)
        total = np.cumsum(pending)
        taken = min(int(np.searchsorted(total, room, side="left")) + 1, len(pending))
        segments, counts = self._work[:taken], pending[:taken].copy()
        counts[-1] -= max(0, int(total[taken - 1]) - room)
        wanted = -(-(state.num_computed[segments] + counts) // self.pool.block_size)
        missing = np.cumsum(wanted - self._tables.num_held[segments])
        if not self._reclaim(int(missing[-1])):
            taken = int(np.searchsorted(missing, self.pool.num_free, side="right"))
            segments, counts, wanted = segments[:taken], counts[:taken], wanted[:taken]
        self._tables.grow(segments, wanted)
        complete = counts == pending[:taken]
        self._work = self._work[int(complete.sum()) :]  # all but perhaps the last are
        return Work(segments, counts, complete & self._leaves(segments))

    def _repeat(self, batch: Batch, decodes: Ints, max_steps: int) -> Batch:
        """Let a batch of decodes stand for as many steps as nothing changes in."""
        state, size = self._state, self.pool.block_size
        until_expected = int(self._projection.finish[decodes].min()) - self._projection.now + 1
        steps = min(max_steps, until_expected)
        more = np.full(len(decodes), steps - 1)
        wanted = -(-(state.num_computed[decodes] + more) // size)
        if steps < 2 or int((wanted - self._tables.num_held[decodes]).sum()) > self.pool.num_free:
            return batch
        self._tables.grow(decodes, wanted)
        state.account(decodes, more)
        self.stats.steps += steps - 1
        return replace(batch, num_steps=steps)

    # Memory

    def _reclaim(self, count: int) -> bool:
        return self._idle.reclaim(count, self._queue.peek(1))

    def _free(self, segments: Ints) -> None:
        self._tables.release(segments)
        self._state.num_computed[segments] = 0

    def _preempt_last(self) -> None:
        state = self._state
        admitted = self._work[self._leaves(self._work)]
        running = np.concatenate([self._decoding, admitted])
        last = running[np.argmax(self._admitted[running])]
        assert len(running) > 1, f"leaf {state.leaf[last]} alone does not fit the pool"
        self._decoding = self._decoding[self._decoding != last]
        self._work = self._work[state.owner[self._work] != last]
        self._projection.preempt(np.array([last]))
        self._release(np.array([last]))
        self._queue.put_back(int(last))
        self._admission_open = False
        self.stats.preemptions += 1

    def _release(self, sequences: Ints) -> None:
        """Sequences stop running: their private blocks go back, their nodes may fall idle."""
        self._num_running -= len(sequences)
        self._free(sequences)
        self._admission_open = True
        nodes = self._running.remove(sequences)
        if len(nodes):
            self._projection.drop_nodes(nodes)
            self._nodes = self._nodes[self._running.children[self._nodes] > 0]
            self._idle.add(nodes)

    def _drop_finished(self, nodes: Ints) -> None:
        """No sequence below these nodes is unfinished."""
        self._idle.remove(nodes)
        self._free(nodes)

    def _ends(self, token_ids: TokenIds) -> NDArray[np.bool_]:
        """Which tokens end an answer; there are few of them, so one comparison each is least."""
        ends = np.zeros(len(token_ids), dtype=np.bool_)
        for token in self._eos_token_ids:
            ends |= token_ids == token
        return ends

    def _leaves(self, segments: Ints) -> NDArray[np.bool_]:
        leaves: NDArray[np.bool_] = self._state.leaf[segments] != NOBODY
        return leaves

    def _blocks_alone(self, sequences: Ints) -> Ints:
        state, size = self._state, self.pool.block_size
        longest = state.length[sequences] + state.max_tokens[sequences] - 1
        return state.blocks_above(size)[sequences] + -(-longest // size)

    def _finished(self, sequence: int, reason: FinishReason) -> FinishedSequence:
        state = self._state
        return FinishedSequence(
            leaf=int(state.leaf[sequence]),
            output_token_ids=state.outputs.take(sequence, int(state.num_outputs[sequence])),
            finish_reason=reason,
            num_fresh_prompt_tokens=int(state.num_fresh[sequence]),
        )
