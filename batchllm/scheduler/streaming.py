"""The scheduler of a streaming engine, to compare with: first come, first served, and a cache."""

from collections import deque

import numpy as np
from numpy.typing import NDArray

from batchllm.cache.lru_cache import LRUBlockCache
from batchllm.prefix.plan import PrefixPlan
from batchllm.prefix.sorting import common_prefix_lengths, sort_sequences
from batchllm.request import RaggedTokens, TokenIds
from batchllm.scheduler.base import SchedulerStats
from batchllm.scheduler.batch import (
    Batch,
    Chunks,
    Ending,
    FinishedSequence,
    Samples,
    SharedReads,
    StepOutput,
    endings,
)
from batchllm.scheduler.expected import Expected
from batchllm.scheduler.state import OutputTokens

Ints = NDArray[np.int64]
_NONE: Ints = np.zeros(0, dtype=np.int64)
_NO_TOKENS: TokenIds = np.zeros(0, dtype=np.int32)
_NO_BLOCKS = np.zeros((0, 0), dtype=np.int32)


class StreamingScheduler:
    """Rows in table order, at most `max_num_seqs` of them, with prefixes found by luck.

    As vLLM's V1 scheduler does it: each step goes through the running requests in the order of
    their admission and gives each its next tokens until the step's token budget is used up, then
    admits waiting ones. A request whose leading full blocks lie in the LRU cache starts behind
    them, but computes its last prompt token in any case. When blocks run out, the request admitted
    last is preempted: it loses its blocks and waits at the head of the queue. Nothing is planned:
    a request is admitted if its whole prompt fits now, whatever the others will need. Nor is
    attention shared: every request reads its own context. (vLLM 0.32, `v1/core`.)

    Blocks of answers take part in the cache, but are not looked up: no row continues them.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        max_model_len: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.cache = LRUBlockCache(num_blocks)
        self.stats = SchedulerStats()
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._eos_token_ids = eos_token_ids
        self._waiting: deque[int] = deque()
        self._running = _NONE  # rows, in order of admission
        self._expected: Expected | None = None

    def add(self, plan: PrefixPlan) -> list[FinishedSequence]:
        """Queue a window planned without sharing, so that leaf i is row i.

        Returns the rows that could not run even alone in the pool, ended by `kv_memory`.
        """
        assert not self.has_unfinished, "one window at a time"
        assert plan.tree.num_nodes == 0, "a streaming engine knows no tree"
        self._plan = plan
        size, count = self._block_size, len(plan.tokens)
        self._length = plan.tokens.lengths
        self._max_tokens = np.minimum(plan.max_tokens, self._max_model_len - self._length)
        ignore = np.array([p.ignore_eos for p in plan.params], dtype=np.bool_)
        self._ignore_eos = ignore[plan.params_index]
        self._keys = block_keys(plan.tokens, size)
        self.cache.forget()  # keys are a window's own
        self._num_computed = np.zeros(count, dtype=np.int64)
        self._num_outputs = np.zeros(count, dtype=np.int64)
        self._num_fresh = np.zeros(count, dtype=np.int64)
        self._high_water = np.zeros(count, dtype=np.int64)
        self._has_ended = np.zeros(count, dtype=np.bool_)
        self._expected = None
        self._outputs = OutputTokens(count)
        self._blocks: dict[int, list[int]] = {}  # of running rows
        alone = -(-(self._length + self._max_tokens - 1) // size)
        fits = alone <= self.cache.num_blocks
        self._waiting.extend(plan.leaf_order[fits[plan.leaf_order]].tolist())
        return [self._finished(row, "kv_memory") for row in np.flatnonzero(~fits).tolist()]

    def running_leaves(self) -> Ints:
        """The rows that run; see `StepScheduler`."""
        if self._expected is None:
            return self._running
        return np.concatenate([self._running, self._expected.samples.leaf])

    def blocks_alone(self, leaf: int) -> int:
        """Blocks a row needs to its longest end, with nothing else in the pool."""
        return -(-int(self._length[leaf] + self._max_tokens[leaf] - 1) // self._block_size)

    @property
    def has_unfinished(self) -> bool:
        return self.has_work or self._expected is not None

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or len(self._running))

    @property
    def peak_kv_blocks(self) -> int:
        """The most blocks that were ever in use at once."""
        return self.cache.peak_used

    def schedule(self, ends: Ints | None = None) -> Batch:
        """The next step; with `ends` perhaps several, as `StepScheduler` says."""
        counts, preempted = self._grow_running()
        decodes = len(self._running)
        room = self._max_num_batched_tokens - int(counts.sum())
        admitted = _NONE if preempted else self._admit(room)
        rows = np.concatenate([self._running, admitted])
        counts = np.concatenate([counts, self._new_tokens(admitted, room)])
        self._running = rows
        rows, counts = rows[counts > 0], counts[counts > 0]
        only_decodes = len(admitted) == 0 and bool((counts == 1).all()) and len(rows) == decodes
        offset = self._num_computed[rows]
        self._account(rows, counts)
        for i in (offset < self._length[rows]).nonzero()[0].tolist():
            if i < len(rows) - len(admitted):  # the others' are known since their admission
                self._remember(int(rows[i]), int(offset[i]), int(offset[i] + counts[i]))
        steps = 1
        nothing_joins = only_decodes and not preempted and bool((self._pending(rows) == 0).all())
        if ends is not None and nothing_joins:
            steps = self._repeat(rows, int((ends[rows] - self._num_outputs[rows]).min()))
        self.stats.steps += steps
        batch = self._batch(rows, counts, offset, steps, dry=ends is not None)
        return batch if self._expected is None else self._expected.carry(batch)

    def expect(self, batch: Batch) -> None:
        """Go on as if none of the tokens that a batch samples ended an answer."""
        assert self._expected is None, "one batch at a time is expected"
        expected = self._expected = Expected.of(batch, self._has_ended, self._max_tokens)
        rows, num_outputs = expected.sequences, expected.num_outputs
        self._outputs.put(rows, num_outputs - 1, np.zeros(len(rows), dtype=np.int32))
        self._num_outputs[rows] = num_outputs
        self._stop(rows[expected.is_last])
        self.stats.vain_tokens += expected.num_in_vain

    def update(self, batch: Batch, output: StepOutput) -> list[FinishedSequence]:
        """Append the sampled tokens; returns the rows that are finished by them."""
        if self._expected is not None:
            assert batch.samples is self._expected.samples, "another batch is expected"
            return self._learn(output)
        rows = batch.samples.sequence
        num_outputs = batch.samples.output_position + batch.num_steps
        if len(batch.token_ids):  # nobody will read what is only simulated
            self._outputs.put(rows, num_outputs - 1, output.token_ids)
        self._num_outputs[rows] = num_outputs
        stopped = output.ends(self._eos_token_ids) & ~self._ignore_eos[rows]
        failed = output.failed
        done = stopped | failed | (num_outputs >= self._max_tokens[rows])
        self._stop(rows[done])
        return self._report(rows[done], stopped[done], failed[done])

    def check(self) -> None:
        """Assert the books of the cache (for tests)."""
        assert set(self._blocks) == set(self._running.tolist())
        self.cache.check([block for blocks in self._blocks.values() for block in blocks])

    def _learn(self, output: StepOutput) -> list[FinishedSequence]:
        """What was expected is known: fill it in, and end those that it ended."""
        expected, self._expected = self._expected, None
        assert expected is not None
        rows, output = expected.sequences, expected.tokens(output)
        self._outputs.put(rows, expected.num_outputs - 1, output.token_ids)
        stopped = output.ends(self._eos_token_ids) & ~self._ignore_eos[rows]
        failed = output.failed
        done = stopped | failed | expected.is_last
        early = rows[done & ~expected.is_last]
        waits = np.isin(early, self._running, invert=True)  # preempted meanwhile
        self._stop(early[~waits])
        for row in early[waits].tolist():
            self._waiting.remove(row)
        return self._report(rows[done], stopped[done], failed[done])

    def _stop(self, rows: Ints) -> None:
        """Running rows hold nothing any more."""
        if len(rows) == 0:
            return
        for row in rows.tolist():
            self._let_go(row)
        self._has_ended[rows] = True
        self._running = self._running[~self._has_ended[self._running]]

    def _report(
        self, rows: Ints, stopped: NDArray[np.bool_], failed: NDArray[np.bool_]
    ) -> list[FinishedSequence]:
        self._num_outputs[rows[failed]] -= 1
        ways = endings(stopped, failed)
        return [self._finished(row, how) for row, how in zip(rows.tolist(), ways, strict=True)]

    def _pending(self, rows: Ints) -> Ints:
        return self._length[rows] + self._num_outputs[rows] - self._num_computed[rows]

    def _grow_running(self) -> tuple[Ints, bool]:
        """Tokens for each running row, and blocks for them; and whether one was preempted."""
        preempted = False
        while True:
            rows = self._running
            pending = self._pending(rows)
            before = np.cumsum(pending) - pending
            counts = np.clip(self._max_num_batched_tokens - before, 0, pending)
            have = -(-self._num_computed[rows] // self._block_size)
            missing = -(-(self._num_computed[rows] + counts) // self._block_size) - have
            if int(missing.sum()) <= self.cache.num_free:
                break
            preempted = True
            self._preempt_last()
        self._extend(rows, missing)
        return counts, preempted

    def _extend(self, rows: Ints, missing: Ints) -> None:
        wanting = missing.nonzero()[0]
        taken, begin = self.cache.allocate(int(missing.sum())), 0
        for row, count in zip(rows[wanting].tolist(), missing[wanting].tolist(), strict=True):
            self._blocks[row] += taken[begin : begin + count]
            begin += count

    def _admit(self, room: int) -> Ints:
        """Admit from the queue's head as long as prompts fit now."""
        admitted: list[int] = []
        size = self._block_size
        while room > 0 and self._waiting:
            if len(self._running) + len(admitted) >= self._max_num_seqs:
                break
            row = self._waiting[0]
            total = int(self._length[row] + self._num_outputs[row])
            found = self.cache.find(self._keys[row][: (total - 1) // size])
            cached = len(found) * size
            count = min(total - cached, room)
            whole = -(-total // size) - len(found)
            if whole + self.cache.num_unused(found) > self.cache.num_free:
                break
            missing = -(-(cached + count) // size) - len(found)
            self._waiting.popleft()
            self.cache.share(found)
            self._blocks[row] = found + self.cache.allocate(missing)
            self._num_computed[row] = cached
            self._high_water[row] = max(int(self._high_water[row]), cached)
            self._remember(row, cached, cached + count)
            admitted.append(row)
            room -= count
        return np.array(admitted, dtype=np.int64)

    def _new_tokens(self, admitted: Ints, room: int) -> Ints:
        pending = self._pending(admitted)
        counts: Ints = np.clip(room - (np.cumsum(pending) - pending), 0, pending)
        return counts

    def _remember(self, row: int, begin: int, end: int) -> None:
        """Make blocks that tokens `[begin, end)` fill known by their content."""
        keys, size = self._keys[row], self._block_size
        first, last = begin // size, min(end // size, len(keys))
        self.cache.remember(self._blocks[row][first:last], keys[first:last])

    def _account(self, rows: Ints, counts: Ints) -> None:
        begin = self._num_computed[rows]
        end = begin + counts
        in_prompt = np.minimum(end, self._length[rows])
        fresh = np.maximum(begin, self._high_water[rows])
        self._num_fresh[rows] += np.maximum(in_prompt - fresh, 0)
        self.stats.computed_prompt_tokens += int(np.maximum(in_prompt - begin, 0).sum())
        self.stats.recomputed_tokens += int((np.minimum(end, fresh) - begin).sum())
        self._num_computed[rows] = end
        self._high_water[rows] = np.maximum(self._high_water[rows], end)

    def _repeat(self, rows: Ints, most: int) -> int:
        """For how many steps the rows can decode without anything else changing."""
        size = self._block_size
        have = -(-self._num_computed[rows] // size)
        missing = -(-(self._num_computed[rows] + most - 1) // size) - have
        if most < 2 or int(missing.sum()) > self.cache.num_free:
            return 1
        self._extend(rows, missing)
        self._account(rows, np.full(len(rows), most - 1))
        return most

    def _preempt_last(self) -> None:
        row = int(self._running[-1])
        assert len(self._running) > 1, f"row {row} alone does not fit the pool"
        self._running = self._running[:-1]
        self._let_go(row)
        self._num_computed[row] = 0
        self._waiting.appendleft(row)
        self.stats.preemptions += 1

    def _let_go(self, row: int) -> None:
        full = int(self._num_computed[row]) // self._block_size
        self.cache.release(self._blocks.pop(row), full)

    def _batch(self, rows: Ints, counts: Ints, offset: Ints, steps: int, *, dry: bool) -> Batch:
        sampling = np.flatnonzero(
            self._pending(rows) == 1 - steps
        )  # repeated steps are counted already
        sequences = rows[sampling]
        plan = self._plan
        return Batch(
            token_ids=_NO_TOKENS if dry else self._token_ids(rows, offset, counts),
            chunks=Chunks(counts, offset, offset),
            shared=SharedReads(_NONE, _NONE, _NONE, _NONE),
            tables=_NO_BLOCKS if dry else self._tables(rows),
            samples=Samples(
                chunk=sampling,
                sequence=sequences,
                leaf=sequences,
                row_index=plan.row_index[sequences],
                output_position=self._num_outputs[sequences],
                params_index=plan.params_index[sequences],
                params=plan.params,
            ),
            num_decodes=int((counts == 1).sum()),
            num_steps=steps,
        )

    def _token_ids(self, rows: Ints, offset: Ints, counts: Ints) -> TokenIds:
        parts = []
        for row, begin, count in zip(rows.tolist(), offset.tolist(), counts.tolist(), strict=True):
            prompt = self._plan.tokens[row]
            positions = np.arange(max(begin, len(prompt)), begin + count) - len(prompt)
            parts.append(prompt[begin : begin + count])
            parts.append(self._outputs.get(np.full(len(positions), row), positions))
        return np.concatenate(parts)

    def _tables(self, rows: Ints) -> NDArray[np.int32]:
        blocks = [self._blocks[row] for row in rows.tolist()]
        tables = np.zeros((len(rows), max(map(len, blocks))), dtype=np.int32)
        for table, ids in zip(tables, blocks, strict=True):
            table[: len(ids)] = ids
        return tables

    def _finished(self, row: int, ending: Ending) -> FinishedSequence:
        return FinishedSequence(
            leaf=row,
            output_token_ids=self._outputs.take(row, int(self._num_outputs[row])),
            ending=ending,
            num_fresh_prompt_tokens=int(self._num_fresh[row]),
        )


def block_keys(tokens: RaggedTokens, block_size: int) -> list[list[int]]:
    """For each prompt the keys of its full blocks: equal exactly where all tokens so far are.

    In sorted order, the prompts that agree in their first n tokens are neighbours; a block ending
    at n is named by the first of them and its number.
    """
    order = sort_sequences(tokens)
    shared = common_prefix_lengths(tokens, order)
    most = int(tokens.lengths.max(initial=0)) // block_size
    places = np.arange(len(order))
    keys: list[list[int]] = [[] for _ in range(len(order))]
    num_blocks = tokens.lengths[order] // block_size
    for block in range(most):
        new = np.concatenate([[True], shared < (block + 1) * block_size])
        first = np.maximum.accumulate(np.where(new, places, 0))
        reach = np.flatnonzero(num_blocks > block)
        for row, name in zip(order[reach].tolist(), first[reach].tolist(), strict=True):
            keys[row].append(name * most + block)
    return keys
