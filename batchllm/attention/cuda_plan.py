"""A step's attention as units of work for the `cuda` kernel: numpy, no torch.

A unit is a tile of neighbouring queries against a piece of a context (cuda/include/batchllm's
step.h). Every chunk's own segment is read by the chunk's own tiles. A shared segment is read either
by tiles over all its queries, each of which then has one more partial result to merge, or by the
chunks' own tiles on their way, which read it again and again but merge nothing: whichever is
cheaper (FastTree and DeFT decide likewise). Long units are cut in pieces so that the device's
blocks end together.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.runner.model_input import AttentionItems

Ints = NDArray[np.int64]

SMALL_ROWS = 16  # a small unit's, all warps on the same rows
LARGE_ROWS = 64
NO_PARTIAL = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCosts:
    """What units cost, in what a small one spends on a key: its 2 * head_dim values read.

    `large_key` is a large unit's spending on a key; `unit` is spent on any, `partial_row` on a
    partial result of one query and head, written and merged. `least_keys` is the shortest piece
    that a unit is cut into.
    """

    large_key: float = 1.5
    unit: float = 64.0
    partial_row: float = 3.0
    least_keys: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkPlan:
    """Units, reads and merges of a step, as the kernel takes them.

    `units` int32 [num_units, 10], the dearest first. `read_key` and `read_block` int32
    [num_reads]: where in its context a read begins, and where its blocks are in `block_ids` int32.
    `merge_query` int32 [num_merges], `merge_offsets` int32 [num_merges + 1], `merge_origins` int32.
    """

    units: NDArray[np.int32]
    read_key: NDArray[np.int32]
    read_block: NDArray[np.int32]
    block_ids: NDArray[np.int32]
    merge_query: NDArray[np.int32]
    merge_offsets: NDArray[np.int32]
    merge_origins: NDArray[np.int32]
    num_partial_rows: int


@dataclass(slots=True)
class _Tiles:
    """Tiles before they are cut; all [num_tiles].

    Tile t's context is the items `items[first[t] : last[t]]`, of which it walks the first `keys[t]`
    tokens; its i-th query sees `visible[t] + i * causal[t]` of them.
    """

    query: Ints
    count: Ints
    first: Ints
    last: Ints
    keys: Ints
    visible: Ints
    causal: Ints
    items: Ints

    def __len__(self) -> int:
        return len(self.query)


def plan_units(
    items: AttentionItems,
    num_queries: int,
    *,
    group: int,
    num_kv_heads: int,
    num_blocks: int,
    costs: UnitCosts,
) -> WorkPlan:
    """Plan a step for a model with `group` query heads a kv head.

    `num_blocks` is how many blocks the device holds at once.
    """
    shared = np.flatnonzero(~items.own)
    own = np.flatnonzero(items.own)
    own = own[np.argsort(items.query_begin[own], kind="stable")]
    shared = shared[np.argsort(items.kv_start[shared], kind="stable")]
    apart = _is_cheaper_apart(items, own, shared, group, costs)
    tiles = _join(
        _own_tiles(items, own, shared[~apart], group),
        _shared_tiles(items, shared[apart], group),
    )
    return _cut(tiles, items, num_queries, group, num_kv_heads, num_blocks, costs)


def tile_queries(counts: Ints, group: int) -> Ints:
    """How many queries a tile takes of ranges of `counts` queries."""
    return np.where(counts * group <= SMALL_ROWS, counts, max(1, LARGE_ROWS // group))


def _key_cost(counts: Ints, group: int, costs: UnitCosts) -> NDArray[np.float64]:
    """What the tiles over ranges of `counts` queries spend on one key."""
    num_tiles = -(-counts // tile_queries(counts, group))
    cost: NDArray[np.float64] = num_tiles * _tile_key_cost(counts, group, costs)
    return cost


def _tile_key_cost(counts: Ints, group: int, costs: UnitCosts) -> NDArray[np.float64]:
    """What a tile of `counts` queries spends on one key."""
    return np.where(counts * group <= SMALL_ROWS, 1.0, costs.large_key)


def _is_cheaper_apart(
    items: AttentionItems, own: Ints, shared: Ints, group: int, costs: UnitCosts
) -> NDArray[np.bool_]:
    """Which shared items tiles of their own should read, [num_shared]."""
    counts = items.query_end[own] - items.query_begin[own]
    along = np.concatenate([[0.0], np.cumsum(_key_cost(counts, group, costs))])
    first = np.searchsorted(items.query_begin[own], items.query_begin[shared])
    last = np.searchsorted(items.query_begin[own], items.query_end[shared])
    queries = items.query_end[shared] - items.query_begin[shared]
    length = items.kv_len[shared]
    alone = length * _key_cost(queries, group, costs)
    alone += costs.unit + costs.partial_row * queries * group
    apart: NDArray[np.bool_] = alone < length * (along[last] - along[first])
    return apart


def _own_tiles(items: AttentionItems, own: Ints, along: Ints, group: int) -> _Tiles:
    """Tiles of the chunks, over the shared items read along the way and then their own."""
    first = np.searchsorted(items.query_begin[own], items.query_begin[along])
    last = np.searchsorted(items.query_begin[own], items.query_end[along])
    readers = last - first
    chunk = np.arange(readers.sum()) + np.repeat(first - (np.cumsum(readers) - readers), readers)
    item = np.concatenate([np.repeat(along, readers), own])  # by position, own ones last
    chunk = np.concatenate([chunk, np.arange(len(own))])
    item = item[np.argsort(chunk, kind="stable")]
    ends = np.cumsum(np.bincount(chunk, minlength=len(own)))
    begins = np.concatenate([[0], ends[:-1]])
    read = np.concatenate([[0], np.cumsum(items.kv_len[item])])
    context = read[ends] - read[begins]
    counts = items.query_end[own] - items.query_begin[own]
    which, start, count = _tile(counts, group)
    visible = context[which] - (counts[which] - 1 - start)  # of a tile's first query
    return _Tiles(
        query=items.query_begin[own][which] + start,
        count=count,
        first=begins[which],
        last=ends[which],
        keys=visible + count - 1,
        visible=visible,
        causal=np.ones(len(which), dtype=np.int64),
        items=item,
    )


def _shared_tiles(items: AttentionItems, shared: Ints, group: int) -> _Tiles:
    """Tiles over the readers of shared items; items with the same readers make one context."""
    keys = np.stack([items.query_begin[shared], items.query_end[shared]])
    order = np.lexsort((items.kv_start[shared], keys[1], keys[0]))
    shared, keys = shared[order], keys[:, order]
    is_first = np.ones(len(shared), dtype=np.bool_)
    is_first[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
    begins = np.flatnonzero(is_first)
    ends = np.append(begins, len(shared))[1:]
    read = np.concatenate([[0], np.cumsum(items.kv_len[shared])])
    context = read[ends] - read[begins]
    which, start, count = _tile(keys[1, begins] - keys[0, begins], group)
    return _Tiles(
        query=keys[0, begins][which] + start,
        count=count,
        first=begins[which],
        last=ends[which],
        keys=context[which],
        visible=context[which],
        causal=np.zeros(len(which), dtype=np.int64),
        items=shared,
    )


def _tile(counts: Ints, group: int) -> tuple[Ints, Ints, Ints]:
    """Cut ranges of queries into tiles: of which range, from where in it, how many."""
    size = tile_queries(counts, group)
    num_tiles = -(-counts // size)
    which = np.repeat(np.arange(len(counts)), num_tiles)
    index = np.arange(len(which)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    # Evenly, so that no tile is left with a few.
    start = index * counts[which] // num_tiles[which]
    return which, start, (index + 1) * counts[which] // num_tiles[which] - start


def _join(a: _Tiles, b: _Tiles) -> _Tiles:
    offset = len(a.items)
    return _Tiles(
        *(np.concatenate([x, y]) for x, y in ((a.query, b.query), (a.count, b.count))),
        *(np.concatenate([x, y + offset]) for x, y in ((a.first, b.first), (a.last, b.last))),
        *(np.concatenate([x, y]) for x, y in ((a.keys, b.keys), (a.visible, b.visible))),
        *(np.concatenate([x, y]) for x, y in ((a.causal, b.causal), (a.items, b.items))),
    )


def _cut(
    tiles: _Tiles,
    items: AttentionItems,
    num_queries: int,
    group: int,
    num_kv_heads: int,
    num_blocks: int,
    costs: UnitCosts,
) -> WorkPlan:
    """Cut long tiles into pieces, number the partial results, and say who merges which."""
    key_cost = _tile_key_cost(tiles.count, group, costs)
    total = float((tiles.keys * key_cost + costs.unit).sum()) * num_kv_heads
    most = max(total / num_blocks, costs.least_keys)
    pieces = np.maximum(np.ceil(tiles.keys * key_cost / most).astype(np.int64), 1)
    pieces = np.minimum(pieces, np.maximum(tiles.keys // costs.least_keys, 1))
    tile = np.repeat(np.arange(len(tiles)), pieces)
    piece = np.arange(len(tile)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = piece * tiles.keys[tile] // pieces[tile]
    end = (piece + 1) * tiles.keys[tile] // pieces[tile]

    # A query that several units answer gets a partial result of each.
    parts = np.zeros(num_queries + 1, dtype=np.int64)
    np.add.at(parts, tiles.query, pieces)
    np.add.at(parts, tiles.query + tiles.count, -pieces)
    parts = np.cumsum(parts)[:-1]
    assert (parts > 0).all(), "a query without a context"
    is_partial = parts[tiles.query] > 1
    rows = np.where(is_partial, tiles.count * group, 0)[tile]
    partial = np.cumsum(rows) - rows
    cost = (end - begin) * key_cost[tile] + costs.unit
    order = np.argsort(-cost, kind="stable")
    units = np.stack(
        [
            tiles.query[tile],
            tiles.count[tile],
            tiles.first[tile],
            tiles.last[tile],
            begin,
            end,
            tiles.visible[tile],
            tiles.causal[tile],
            np.where(is_partial[tile], partial, NO_PARTIAL),
            (tiles.count * group <= SMALL_ROWS)[tile],
        ],
        axis=1,
    ).astype(np.int32)

    merged = tile[is_partial[tile]]
    queries = _ranges(tiles.query[merged], tiles.count[merged])
    origins = np.repeat(
        (partial[is_partial[tile]] - tiles.query[merged] * group), tiles.count[merged]
    )
    by_query = np.argsort(queries, kind="stable")
    merge_query = np.flatnonzero(parts > 1)
    read_key, first_blocks = _reads(tiles, items)
    return WorkPlan(
        units=units[order],
        read_key=read_key,
        read_block=first_blocks,
        block_ids=items.block_ids.astype(np.int32),
        merge_query=merge_query.astype(np.int32),
        merge_offsets=np.concatenate([[0], np.cumsum(parts[merge_query])]).astype(np.int32),
        merge_origins=origins[by_query].astype(np.int32),
        num_partial_rows=int(rows.sum()),
    )


def _reads(tiles: _Tiles, items: AttentionItems) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Where in its context each read begins, and where its blocks are."""
    read = np.concatenate([[0], np.cumsum(items.kv_len[tiles.items])])
    start_of_context = np.zeros(len(tiles.items), dtype=np.int64)
    firsts = np.unique(tiles.first)
    start_of_context[firsts] = np.diff(np.concatenate([[0], read[firsts]]))
    return (
        (read[:-1] - np.cumsum(start_of_context)).astype(np.int32),
        items.block_offsets[tiles.items].astype(np.int32),
    )


def _ranges(begin: Ints, count: Ints) -> Ints:
    """All numbers of the ranges, one range behind the other."""
    ends = np.cumsum(count)
    numbers: Ints = np.repeat(begin - (ends - count), count)
    return numbers + np.arange(len(numbers))
