"""From a batch to the flat index arrays that a model runs on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.request import TokenIds
from batchllm.scheduler.batch import Batch, Samples

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
    `sample_rows` int64 [num_samples], the tokens whose logits are wanted, ascending.
    """

    token_ids: TokenIds
    positions: Ints
    slots: Ints
    items: AttentionItems
    sample_rows: Ints
    samples: Samples


def build_model_input(batch: Batch, block_size: int) -> ModelInput:
    """Lay a batch out flat. Its chunks are in depth-first order."""
    chunks = batch.chunks
    ends = np.cumsum(chunks.count)
    chunk = np.repeat(np.arange(len(chunks)), chunks.count)
    within = np.arange(batch.num_tokens) - (ends - chunks.count)[chunk]
    place = within + chunks.offset[chunk]
    blocks = batch.tables[chunk, place // block_size].astype(np.int64)
    return ModelInput(
        token_ids=batch.token_ids,
        positions=within + chunks.start[chunk],
        slots=blocks * block_size + place % block_size,
        items=_attention_items(batch, ends, block_size),
        sample_rows=ends[batch.samples.chunk] - 1,
        samples=batch.samples,
    )


def _attention_items(batch: Batch, ends: Ints, block_size: int) -> AttentionItems:
    """One item a chunk for its own segment, and one a shared segment for all its readers."""
    chunks, shared = batch.chunks, batch.shared
    kv_len = np.concatenate([chunks.offset + chunks.count, shared.length])
    num_blocks = -(-kv_len // block_size)
    in_table = np.arange(batch.tables.shape[1]) < num_blocks[:, None]
    return AttentionItems(
        query_begin=np.concatenate(
            [ends - chunks.count, (ends - chunks.count)[shared.chunk_begin]]
        ),
        query_end=np.concatenate([ends, ends[shared.chunk_end - 1]]),
        kv_start=np.concatenate([chunks.start - chunks.offset, shared.start]),
        kv_len=kv_len,
        own=np.arange(len(kv_len)) < len(chunks),
        block_offsets=np.concatenate([[0], np.cumsum(num_blocks)]),
        block_ids=batch.tables[in_table].astype(np.int64),
    )
