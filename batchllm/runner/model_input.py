"""From a batch to the flat index arrays that a model runs on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.request import TokenIds
from batchllm.scheduler.state import Batch, Chunk, Node, Sample

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AttentionItems:
    """Which queries of a step read which KV: one item is a range of queries times one segment.

    Item i: queries `[query_begin[i], query_end[i])` of the flat batch attend to the first
    `kv_len[i]` tokens held in blocks `block_ids[block_offsets[i]:block_offsets[i + 1]]`, which
    are those at positions `kv_start[i]` and on. If
    `own[i]`, the segment is the one these queries' keys are written to and the mask is causal: the
    last query sees all `kv_len` tokens, the one before it one less. Otherwise the segment lies
    wholly before them and every query sees all of it. The items that cover a query partition its
    context.

    Arrays are int64 [num_items] (`block_offsets` one more), `own` bool [num_items].
    """

    query_begin: Ints
    query_end: Ints
    kv_start: Ints
    kv_len: Ints
    own: NDArray[np.bool_]
    block_offsets: Ints
    block_ids: Ints

    def __len__(self) -> int:
        return len(self.kv_len)

    def blocks(self, item: int) -> Ints:
        """Block ids of one item's segment."""
        return self.block_ids[self.block_offsets[item] : self.block_offsets[item + 1]]


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One step, flat: tokens of all chunks one behind the other, no padding.

    `token_ids` int32 [num_tokens]; `positions` int64 [num_tokens], in the prompt; `slots` int64
    [num_tokens], where each token's KV goes (block id x block size + place in the block);
    `sample_rows` int64 [num_samples], the tokens whose logits are wanted.
    """

    token_ids: TokenIds
    positions: Ints
    slots: Ints
    items: AttentionItems
    sample_rows: Ints
    samples: list[Sample]


def build_model_input(batch: Batch, block_size: int) -> ModelInput:
    """Lay a batch out flat. Its chunks are in depth-first order."""
    chunks = batch.chunks
    counts = np.array([len(c.token_ids) for c in chunks], dtype=np.int64)
    ends = np.cumsum(counts)
    begins = ends - counts
    token_ids = np.concatenate([np.asarray(c.token_ids, dtype=np.int32) for c in chunks])
    within = np.arange(batch.num_tokens) - np.repeat(begins, counts)
    offsets = np.array([c.offset for c in chunks], dtype=np.int64)
    starts = np.array([c.start for c in chunks], dtype=np.int64)
    return ModelInput(
        token_ids=token_ids,
        positions=within + np.repeat(starts, counts),
        slots=_slots(chunks, within + np.repeat(offsets, counts), counts, block_size),
        items=_attention_items(chunks, begins.tolist(), ends.tolist()),
        sample_rows=ends[[c.sample is not None for c in chunks]] - 1,
        samples=[c.sample for c in chunks if c.sample is not None],
    )


def _slots(chunks: list[Chunk], places: Ints, counts: Ints, block_size: int) -> Ints:
    """Slot of every token, given its place in its segment."""
    table_sizes = np.array([len(c.block_ids) for c in chunks], dtype=np.int64)
    tables = np.array([b for c in chunks for b in c.block_ids], dtype=np.int64)
    table_begin = np.repeat(np.cumsum(table_sizes) - table_sizes, counts)
    return tables[table_begin + places // block_size] * block_size + places % block_size


def _attention_items(chunks: list[Chunk], begins: list[int], ends: list[int]) -> AttentionItems:
    """One item a chunk for its own segment, and one a shared node for all its members' queries."""
    items: list[tuple[int, int, int, int, bool]] = []
    tables: list[list[int]] = []
    open_nodes: list[tuple[Node, int]] = []  # the path of the last chunk, with its first query

    def close(keep: int, query_end: int) -> None:
        for node, query_begin in open_nodes[keep:]:
            items.append((query_begin, query_end, node.segment.start, node.num_tokens, False))
            tables.append(node.segment.block_ids)
        del open_nodes[keep:]

    for chunk, begin, end in zip(chunks, begins, ends, strict=True):
        common = 0
        for node, (other, _) in zip(chunk.path, open_nodes, strict=False):
            if node is not other:
                break
            common += 1
        close(common, begin)
        open_nodes.extend((node, begin) for node in chunk.path[common:])
        items.append((begin, end, chunk.start - chunk.offset, chunk.offset + end - begin, True))
        tables.append(chunk.block_ids)
    close(0, ends[-1])
    columns = np.array(items, dtype=np.int64).T
    sizes = np.array([len(t) for t in tables], dtype=np.int64)
    return AttentionItems(
        query_begin=columns[0],
        query_end=columns[1],
        kv_start=columns[2],
        kv_len=columns[3],
        own=columns[4].astype(np.bool_),
        block_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        block_ids=np.array([b for t in tables for b in t], dtype=np.int64),
    )
