"""The scheduler: from a plan to one batch a step."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from batchllm.cache.block_pool import BlockPool
from batchllm.cache.block_table import BlockHolder, BlockTables
from batchllm.prefix.plan import PrefixPlan
from batchllm.scheduler.admission import Admission
from batchllm.scheduler.assemble import Work, assemble
from batchllm.scheduler.base import SchedulerStats
from batchllm.scheduler.batch import Batch, Ending, FinishedSequence, StepOutput, endings
from batchllm.scheduler.expected import Expected
from batchllm.scheduler.idle import IdleNodes
from batchllm.scheduler.lengths import LengthEstimator
from batchllm.scheduler.projection import Projection
from batchllm.scheduler.queue import AdmissionQueue
from batchllm.scheduler.running import Running
from batchllm.scheduler.state import NOBODY, ChildCount, Segments

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_NONE: Ints = np.zeros(0, dtype=np.int64)
_NO_WORK = Work(_NONE, _NONE, _NONE, np.zeros(0, dtype=np.bool_))


class Scheduler:
    """Hands out prefill chunks and decodes, mixed, as memory allows.

    Idea: every step takes all decodes and fills the rest of its token budget with prefill. When
    that needs another sequence, it is admitted if the blocks that all admitted sequences will
    hold, projected to each one's expected end, stay within the pool. A sequence's shared nodes are
    computed on its way, once; they are freed when the last sequence below them finishes.

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
        holder: Callable[[BlockPool, int], BlockHolder] = BlockTables,
    ) -> None:
        self.pool = pool
        self.stats = SchedulerStats()
        self.lengths = lengths or LengthEstimator()
        self._max_model_len = max_model_len
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._eos_token_ids = eos_token_ids
        self._holder = holder
        self._num_unfinished = 0
        self._expected: Expected | None = None

    def add(self, plan: PrefixPlan) -> list[FinishedSequence]:
        """Queue a window; the last one must be finished.

        Returns the sequences that could not run even alone in the pool, ended by `kv_memory`.
        """
        assert not self.has_unfinished, "one window at a time"
        state = self._state = Segments(plan, self._max_model_len)
        self._tables = self._holder(self.pool, state.count)
        self._projection = Projection(state, self.pool.block_size)
        self._unfinished = ChildCount(state.parent, state.of_leaf)
        self._running = Running(state)
        self._idle = IdleNodes(state, self._tables, self.pool)
        self._expected = None
        order = state.of_leaf[plan.leaf_order]
        fits = self._blocks_alone(order) <= self.pool.num_blocks
        self._num_unfinished = int(fits.sum())
        self._queue = AdmissionQueue(order[fits])
        self._admission = Admission(
            state,
            self._queue,
            self._running,
            self._idle,
            self._projection,
            self.lengths,
            num_blocks=self.pool.num_blocks,
            block_size=self.pool.block_size,
            step_tokens=self._at_most(plan.step_tokens),
            max_num_seqs=self._max_num_seqs,
        )
        failed = order[~fits]
        self._projection.give_up(failed)
        self._unfinished.remove(failed)
        return self._finished(failed, ["kv_memory"] * len(failed))

    def leaves_not_begun(self) -> Ints:
        """The leaves whose sequences were never admitted, in order."""
        return self._state.leaf[self._queue.not_begun()]

    def rearrange(self, plan: PrefixPlan) -> None:
        """Go on as if the window had been planned so, with those that have not begun."""
        waits = np.zeros(plan.tree.num_leaves, dtype=np.bool_)
        waits[self.leaves_not_begun()] = True
        order = plan.leaf_order[waits[plan.leaf_order]]
        self._queue.rearrange(self._state.of_leaf[order])
        self._admission.step_tokens = self._at_most(plan.step_tokens)
        self._admission.is_open = True

    def shares_so_far(self) -> Floats:
        """How much of what it may have each running answer has by now, if its end is not known."""
        state, running = self._state, self._running.sequences()
        unsure = running[~state.ignore_eos[running]]
        return state.num_outputs[unsure] / state.max_tokens[unsure]

    def running_leaves(self) -> Ints:
        """The leaves whose sequences run; see `StepScheduler`."""
        running = self._state.leaf[self._running.sequences()]
        if self._expected is None:
            return running
        return np.concatenate([running, self._expected.samples.leaf])

    def blocks_alone(self, leaf: int) -> int:
        """Blocks a leaf's sequence needs to its longest end, with nothing else in the pool."""
        return int(self._blocks_alone(self._state.of_leaf[leaf : leaf + 1])[0])

    @property
    def has_unfinished(self) -> bool:
        return self._num_unfinished > 0

    @property
    def has_work(self) -> bool:
        return len(self._running) > 0 or len(self._queue) > 0

    @property
    def peak_kv_blocks(self) -> int:
        """The most blocks that were ever held at once."""
        return self.pool.peak_used

    def schedule(self, ends: Ints | None = None) -> Batch:
        """Admit what fits and choose the next step's tokens; see `StepScheduler`."""
        state, running = self._state, self._running
        self._admission.revise_overdue()
        decodes = self._grow_decodes()
        num_decodes = len(decodes.segments)
        work = self._prefill(self._admission.step_tokens - num_decodes)
        while num_decodes == 0 and len(work.segments) == 0:
            self._preempt_last()
            work = self._prefill(self._admission.step_tokens)
        tables = self._tables if ends is None else None  # a simulation moves no data
        batch = assemble(state, tables, running.nodes, decodes.with_(work), num_decodes)
        if self._expected is not None:
            batch = self._expected.carry(batch)
        state.num_computed[decodes.segments] = decodes.offset + 1
        self.stats.steps += 1
        if len(work.segments):
            prompt_tokens, repeated = state.account(work.segments, work.counts)
            self.stats.computed_prompt_tokens += prompt_tokens
            self.stats.recomputed_tokens += repeated
        elif ends is not None and len(running.work) == 0:
            left = ends[batch.samples.leaf] - batch.samples.output_position
            return self._repeat(batch, int(left.min()))
        return batch

    def expect(self, batch: Batch) -> None:
        """Go on as if none of the tokens that a batch samples ended an answer."""
        assert self._expected is None, "one batch at a time is expected"
        state = self._state
        self._projection.advance(1)
        expected = self._expected = Expected.of(batch, state.has_ended, state.max_tokens)
        sequences, num_outputs = expected.sequences, expected.num_outputs
        state.outputs.put(sequences, num_outputs - 1, np.zeros(len(sequences), dtype=np.int32))
        state.num_outputs[sequences] = num_outputs
        self._go_on(sequences[~expected.is_last])
        self._stop(sequences[expected.is_last])
        self.stats.vain_tokens += expected.num_in_vain

    def update(self, batch: Batch, output: StepOutput) -> list[FinishedSequence]:
        """Append the sampled tokens; returns the sequences that are finished by them."""
        if self._expected is not None:
            assert batch.samples is self._expected.samples, "another batch is expected"
            return self._learn(output)
        state = self._state
        self._projection.advance(batch.num_steps)
        sequences = batch.samples.sequence
        num_outputs = batch.samples.output_position + batch.num_steps
        if len(batch.token_ids):  # nobody will read what is only simulated
            state.outputs.put(sequences, num_outputs - 1, output.token_ids)
        state.num_outputs[sequences] = num_outputs
        stopped, failed = self._stopped(sequences, output), output.failed
        done = stopped | failed | (num_outputs >= state.max_tokens[sequences])
        ended = sequences[done]
        self._go_on(sequences[~done] if len(ended) else sequences)
        self._stop(ended)
        return self._report(ended, stopped[done], failed[done])

    def check(self) -> None:
        """Assert the books of pool, nodes and projection (for tests)."""
        state, running = self._state, self._running
        self._tables.check()
        held = -(-state.num_computed // self.pool.block_size)
        assert np.array_equal(self._tables.num_held, held), "blocks do not match tokens"
        waiting = self._queue.peek(len(self._queue))
        running.check(waiting, self._unfinished)
        nodes = np.flatnonzero((state.leaf == NOBODY) & (state.num_computed > 0))
        assert set(self._idle) == set(nodes.tolist()) - set(running.nodes.tolist())
        self._projection.check(running.sequences(), running.nodes, waiting)

    # One step's result

    def _learn(self, output: StepOutput) -> list[FinishedSequence]:
        """What was expected is known: fill it in, and end those that it ended."""
        expected, self._expected = self._expected, None
        assert expected is not None
        state, sequences, output = self._state, expected.sequences, expected.tokens(output)
        state.outputs.put(sequences, expected.num_outputs - 1, output.token_ids)
        stopped, failed = self._stopped(sequences, output), output.failed
        done = stopped | failed | expected.is_last
        early = sequences[done & ~expected.is_last]
        if len(early):
            state.has_ended[early] = True
            decoding = self._running.decoding
            self._running.decoding = decoding[~state.has_ended[decoding]]
            waits = np.isin(early, decoding, invert=True)
            self._stop(early[~waits])
            self._stop_waiting(early[waits])
        return self._report(sequences[done], stopped[done], failed[done])

    def _stopped(self, sequences: Ints, output: StepOutput) -> NDArray[np.bool_]:
        """Which of the sequences a token ended, [n]."""
        stopped = output.ends(self._eos_token_ids)
        if stopped.any():
            stopped &= ~self._state.ignore_eos[sequences]
        return stopped

    def _go_on(self, sequences: Ints) -> None:
        """These have sampled and decode from now on, and no others."""
        projection = self._projection
        self._running.decoding = sequences
        if projection.latest_start >= projection.now:
            # The first sample of what took shorter to prefill than expected.
            self._admission.revise(sequences[projection.start[sequences] >= projection.now])

    def _stop(self, ended: Ints) -> None:
        """Sequences, no longer among the decoding, hold nothing any more."""
        if len(ended):
            self._projection.remove(ended)
            self._release(ended, self._running.finish(ended))
            self._drop_finished(self._unfinished.remove(ended))

    def _stop_waiting(self, ended: Ints) -> None:
        """Sequences were preempted before it was known that they had ended."""
        if len(ended):
            self._queue.drop(ended)
            self._projection.give_up(ended)
            self._drop_finished(self._unfinished.remove(ended))
            self._admission.is_open = True

    def _report(
        self, ended: Ints, stopped: NDArray[np.bool_], failed: NDArray[np.bool_]
    ) -> list[FinishedSequence]:
        if len(ended) == 0:
            return []
        state = self._state
        state.num_outputs[ended[failed]] -= 1
        learned = ended[~(state.ignore_eos[ended] | failed)]
        if len(learned):
            self.lengths.observe(state.num_outputs[learned], state.max_tokens[learned])
        self._num_unfinished -= len(ended)
        return self._finished(ended, endings(stopped, failed))

    # One step's tokens

    def _grow_decodes(self) -> Work:
        """Give all decodes room for a token, preempting until there is enough."""
        while True:
            decodes = self._running.decoding
            offset = self._state.num_computed[decodes]
            full = decodes[offset % self.pool.block_size == 0]
            if self._reclaim(len(full)):
                break
            self._preempt_last()
        self._tables.append(full)
        once = np.ones(len(decodes), dtype=np.int64)
        return Work(decodes, once, offset, once.astype(np.bool_))

    def _prefill(self, room: int) -> Work:
        """Take up to `room` tokens of prefill, admitting for it, and give them blocks."""
        state, running = self._state, self._running
        backlog = int(state.pending(running.work).sum()) if len(running.work) else 0
        if backlog < room:
            self._admission.admit(room - backlog)
        if room <= 0 or len(running.work) == 0:
            return _NO_WORK
        pending = state.pending(running.work)
        total = pending.cumsum()
        taken = min(int(total.searchsorted(room, side="left")) + 1, len(pending))
        segments, counts = running.work[:taken], pending[:taken].copy()
        counts[-1] -= max(0, int(total[taken - 1]) - room)
        offset = state.num_computed[segments]
        wanted = -(-(offset + counts) // self.pool.block_size)
        missing = np.cumsum(wanted - self._tables.num_held[segments])
        if not self._reclaim(int(missing[-1])):
            taken = int(missing.searchsorted(self.pool.num_free, side="right"))
            segments, counts, offset = segments[:taken], counts[:taken], offset[:taken]
            wanted = wanted[:taken]
        self._tables.grow(segments, wanted)
        complete = counts == pending[:taken]
        running.work = running.work[int(complete.sum()) :]  # all but perhaps the last are
        return Work(segments, counts, offset, complete & state.is_leaf(segments))

    def _repeat(self, batch: Batch, max_steps: int) -> Batch:
        """Let a batch of decodes stand for as many steps as nothing changes in."""
        state, decodes = self._state, batch.samples.sequence
        until_expected = int(self._projection.finish[decodes].min()) - self._projection.now + 1
        steps = min(max_steps, until_expected)
        if steps < 2:
            return batch
        computed = batch.chunks.offset + steps
        wanted = -(-computed // self.pool.block_size)
        if int((wanted - self._tables.num_held[decodes]).sum()) > self.pool.num_free:
            return batch
        self._tables.grow(decodes, wanted)
        state.num_computed[decodes] = computed
        self.stats.steps += steps - 1
        return replace(batch, num_steps=steps)

    def _at_most(self, step_tokens: int | None) -> int:
        most = self._max_num_batched_tokens
        return most if step_tokens is None else min(most, step_tokens)

    # Memory

    def _reclaim(self, count: int) -> bool:
        if self.pool.num_free >= count:
            return True
        return self._idle.reclaim(count, self._queue.peek(1))

    def _preempt_last(self) -> None:
        running = self._running
        last = running.last_admitted()
        assert len(running) > 1, f"leaf {self._state.leaf[last]} alone does not fit the pool"
        self._projection.preempt(np.array([last]))
        self._release(np.array([last]), running.preempt(last))
        self._queue.put_back(last)
        self._admission.is_open = False
        self.stats.preemptions += 1

    def _release(self, sequences: Ints, unneeded: Ints) -> None:
        """Sequences stopped: their private blocks go back, and `unneeded` nodes fall idle."""
        self._free(sequences)
        self._admission.is_open = True
        if len(unneeded):
            self._projection.drop_nodes(unneeded)
            self._idle.add(unneeded)

    def _drop_finished(self, nodes: Ints) -> None:
        """No sequence below these nodes is unfinished."""
        if len(nodes):
            self._idle.remove(nodes)
            self._free(nodes)

    def _free(self, segments: Ints) -> None:
        self._tables.release(segments)
        self._state.drop(segments)

    def _blocks_alone(self, sequences: Ints) -> Ints:
        state, size = self._state, self.pool.block_size
        longest = state.length[sequences] + state.max_tokens[sequences] - 1
        return state.blocks_above(size)[sequences] + -(-longest // size)

    def _finished(self, sequences: Ints, how: Sequence[Ending]) -> list[FinishedSequence]:
        state = self._state
        columns = (sequences, state.leaf[sequences], state.num_outputs[sequences])
        fresh = state.num_fresh[sequences].tolist()
        return [
            FinishedSequence(leaf, state.outputs.take(sequence, count), ending, num_fresh)
            for sequence, leaf, count, num_fresh, ending in zip(
                *(column.tolist() for column in columns), fresh, how, strict=True
            )
        ]
