"""The calls a step makes to FlashInfer, as the arrays that FlashInfer documents. numpy only.

A segment is exact to the token, so that where one ends its last block is part-filled; a page table
allows that for an entry's last page alone. So shared segments are calls of their own, one for each
level of the tree, in which an entry is one segment and its pages are blocks. A level costs two
launches a layer however little is read in it; so where that is little, its segments are *folded*:
they go before their readers' own segments, in pages small enough that each is full.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.runner.model_input import AttentionItems

Ints = NDArray[np.int64]
Int32s = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PagedCall:
    """The arrays of one call, all int32.

    Entry i: queries `[qo_indptr[i], qo_indptr[i + 1])` attend to the pages
    `kv_indices[kv_indptr[i]:kv_indptr[i + 1]]` of `page_size` tokens, all of them full but the
    last, which holds `last_page_len[i]`. If `causal`, an entry's last query sees all of that, the
    one before it one token less, and so on. Entries follow each other without a gap; one that has
    no pages (then its `last_page_len` is 0) is only there for that, and what it gives is not used.
    """

    qo_indptr: Int32s
    kv_indptr: Int32s
    kv_indices: Int32s
    last_page_len: Int32s
    page_size: int
    causal: bool

    def __len__(self) -> int:
        return len(self.last_page_len)

    @property
    def mean_queries(self) -> float:
        """Queries of an entry that has pages, on average."""
        return float(np.diff(self.qo_indptr)[self.last_page_len > 0].mean())


@dataclass(frozen=True, slots=True)
class Level:
    """Shared segments no two of which have a query in common.

    `covered` [num_tokens] are the queries that have one; None if all have.
    """

    call: PagedCall
    covered: NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True)
class StepCalls:
    """A step: what queries read of their own, in two calls, and what they share.

    `decodes` is the call of those queries that are alone in their chunk; they are those at
    `decode_rows` int64, or, where that is None, all there are. `chunks` is that of the others. They
    are apart since one call has one tile size, which long chunks want large and decodes small.
    """

    decodes: PagedCall | None
    decode_rows: Ints | None
    chunks: PagedCall | None
    levels: tuple[Level, ...]


def plan_calls(
    items: AttentionItems,
    num_tokens: int,
    block_size: int,
    fold_below: float,
    *,
    most_levels: int | None = None,
    most_page_size: int | None = None,
) -> StepCalls:
    """The calls that attend to a step's items.

    A level is folded if then fewer than `fold_below` tokens' KV is read again, a token counting
    once for each chunk but the first: with 0 none is, with infinity all are. Of more than
    `most_levels`, those are folded where that is least. Pages of what queries have of their own are
    as large as can be, up to `most_page_size` or else the block size.
    """
    own = np.flatnonzero(items.own)
    own = own[np.argsort(items.query_begin[own], kind="stable")]
    shared = np.flatnonzero(~items.own)
    level = _depths(items, shared)
    begin, end = items.query_begin[own], items.query_end[own]
    first = np.searchsorted(begin, items.query_begin[shared])
    readers = np.searchsorted(begin, items.query_end[shared]) - first
    again = np.bincount(level, (readers - 1) * items.kv_len[shared])
    few = again < fold_below
    if most_levels is not None:
        few[np.argsort(-again, kind="stable")[most_levels:]] = True
    is_folded = few[level]
    folded, readers, first = shared[is_folded], readers[is_folded], first[is_folded]

    entry = np.concatenate([np.repeat(first, readers) + _places(readers), np.arange(len(own))])
    reads = _Reads(items, entry, np.concatenate([np.repeat(folded, readers), own]))
    largest = most_page_size or block_size
    page_size = int(np.gcd.reduce(items.kv_len[folded], initial=largest))
    alone = end - begin == 1
    decodes = chunks = None
    if alone.any():
        count = np.arange(alone.sum() + 1)
        decodes = reads.of(alone, count[:-1]).call(count, block_size, page_size)
    if not alone.all():
        indptr, place = _fill_gaps(begin[~alone], end[~alone], num_tokens)
        chunks = reads.of(~alone, place).call(indptr, block_size, page_size, causal=True)
    return StepCalls(
        decodes=decodes,
        decode_rows=None if decodes is None or chunks is None else begin[alone],
        chunks=chunks,
        levels=tuple(
            _level(items, shared[(level == depth) & ~is_folded], num_tokens, block_size)
            for depth in np.unique(level[~is_folded])
        ),
    )


@dataclass(frozen=True, slots=True)
class _Reads:
    """Entry `entry[i]` reads the item `item[i]`, [num_reads]."""

    items: AttentionItems
    entry: Ints
    item: Ints

    def of(self, wanted: NDArray[np.bool_], place: Ints) -> "_Reads":
        """Those of the entries that are `wanted`, the nth of which becomes entry `place[n]`."""
        renamed = np.full(len(wanted), -1)
        renamed[wanted] = place
        entry = renamed[self.entry]
        return _Reads(self.items, entry[entry >= 0], self.item[entry >= 0])

    def call(
        self, qo_indptr: Ints, block_size: int, page_size: int, *, causal: bool = False
    ) -> PagedCall:
        """The call in which each entry reads its items in the order of their positions."""
        order = np.lexsort((self.items.kv_start[self.item], self.entry))
        entry, item = self.entry[order], self.item[order]
        kv_len = self.items.kv_len[item]
        num_pages = -(-kv_len // page_size)
        pages_of_entry = np.bincount(entry, num_pages, len(qo_indptr) - 1).astype(np.int64)
        last_page_len = np.zeros(len(qo_indptr) - 1, dtype=np.int32)
        last_page_len[entry] = (kv_len - 1) % page_size + 1  # an entry's last item stays
        is_last = np.append(entry[1:] != entry[:-1], True)
        assert (is_last | (kv_len % page_size == 0)).all(), "only the last page may be part-filled"
        # A shared segment's pages are many and read by many: they are made once, then copied.
        in_block = block_size // page_size
        pages = self.items.block_ids[:, None] * in_block + np.arange(in_block)
        assert pages.max(initial=0) < 2**31
        pages = pages.ravel().astype(np.int32)
        begin = self.items.block_offsets[item] * in_block
        runs = zip(begin.tolist(), (begin + num_pages).tolist(), strict=True)
        return PagedCall(
            qo_indptr=qo_indptr.astype(np.int32),
            kv_indptr=np.concatenate([[0], np.cumsum(pages_of_entry)]).astype(np.int32),
            kv_indices=np.concatenate([pages[first:last] for first, last in runs]),
            last_page_len=last_page_len,
            page_size=page_size,
            causal=causal,
        )


def _level(items: AttentionItems, level: Ints, num_tokens: int, block_size: int) -> Level:
    level = level[np.argsort(items.query_begin[level])]
    begin, end = items.query_begin[level], items.query_end[level]
    indptr, place = _fill_gaps(begin, end, num_tokens)
    call = _Reads(items, place, level).call(indptr, block_size, block_size)
    covered = np.repeat(call.last_page_len > 0, np.diff(indptr))
    return Level(call, None if covered.all() else covered)


def _depths(items: AttentionItems, shared: Ints) -> Ints:
    """How many others contain each shared item; any two are disjoint, or one contains the other."""
    begin, end = items.query_begin[shared], items.query_end[shared]
    order = np.lexsort((-end, begin))
    ended = np.searchsorted(np.sort(end), begin[order], side="right")
    depth = np.empty(len(shared), dtype=np.int64)
    depth[order] = np.arange(len(shared)) - ended
    return depth


def _fill_gaps(begin: Ints, end: Ints, num_tokens: int) -> tuple[Ints, Ints]:
    """The indptr of ascending ranges and of what lies between; and where in it the ranges are."""
    assert (begin[1:] >= end[:-1]).all(), "queries in two segments of one level"
    edges = np.concatenate([[0], np.stack([begin, end], axis=1).ravel(), [num_tokens]])
    some = np.diff(edges) > 0
    place = np.cumsum(some)[1::2] - 1
    return np.concatenate([[0], edges[1:][some]]), place


def _places(counts: Ints) -> Ints:
    """0, 1, … up to each count, one behind the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
