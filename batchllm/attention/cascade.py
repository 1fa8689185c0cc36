"""Attention in torch's own kernels: shared segments once for all members, merged by log-sum-exp."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from batchllm.attention.write import rotate_and_write
from batchllm.models.rope import Rotation
from batchllm.runner.model_input import AttentionItems, ModelInput
from batchllm.runner.staging import Put

Ints = NDArray[np.int64]

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FOLD_QUERIES_TIMES_TOKENS = 1024  # a shared read below this costs more calls than it saves bytes
_PADDING = 1.25  # decodes are batched with others up to this much longer
_MIN_BUCKET = 16


@dataclass(frozen=True, slots=True)
class SegmentRead:
    """Queries `[begin, end)` attend to all of `kv_len` tokens in `blocks`."""

    begin: int
    end: int
    kv_len: int
    blocks: torch.Tensor


@dataclass(frozen=True, slots=True)
class DecodeBucket:
    """Decodes with contexts of similar length, read together.

    `rows` [n] are their tokens; `slots` [n * width] what each sees, padded with the last of it: a
    NaN goes through any mask, so nothing is gathered for a row that is not its own. `bias`
    [n, 1, 1, width] is 0 where a slot counts and -inf where it is padding.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    bias: torch.Tensor


class TorchBackend:
    """Cascade attention out of torch's flash kernel, which returns its log-sum-exp.

    Each query's context is a list of segments. A shared segment is read once for all the queries
    below it, as one matrix product; a prefill chunk attends to itself causally and to what its
    segment held before; decodes are batched by length with what they see gathered. Partial
    results are merged exactly. A shared segment that few decodes read is not worth a call of its
    own and is folded into that.
    """

    name = "torch"
    granularity = 1

    def __init__(self, block_size: int, head_dim: int) -> None:
        self._block_size = block_size

    def plan(
        self, step: ModelInput, rotation: Rotation, put: Put = torch.from_numpy
    ) -> "TorchPlan":
        """Sort the step's items into calls."""
        items, num_tokens = step.items, len(step.token_ids)
        queries = items.query_end - items.query_begin
        decodes = np.flatnonzero(items.own & (queries == 1))
        is_decode = np.zeros(num_tokens, dtype=np.int64)
        is_decode[items.query_begin[decodes]] = 1
        decodes_before = np.concatenate([[0], np.cumsum(is_decode)])
        only_decodes = (
            decodes_before[items.query_end] - decodes_before[items.query_begin] == queries
        )
        small = queries * items.kv_len < _FOLD_QUERIES_TIMES_TOKENS
        folded = np.flatnonzero(~items.own & only_decodes & small)
        shared = np.flatnonzero(~items.own & ~(only_decodes & small))
        chunks = np.flatnonzero(items.own & (queries > 1))
        reads = [self._read(items, i, int(items.kv_len[i])) for i in shared.tolist()]
        reads += [  # what a chunk's own segment held before this step
            self._read(items, i, int(items.kv_len[i] - queries[i]))
            for i in chunks.tolist()
            if items.kv_len[i] > queries[i]
        ]
        return TorchPlan(
            rotation=rotation,
            slots=torch.from_numpy(step.slots),
            chunks=[(int(items.query_begin[i]), int(items.query_end[i])) for i in chunks],
            buckets=self._buckets(items, decodes, folded),
            reads=reads,
        )

    def _read(self, items: AttentionItems, item: int, kv_len: int) -> SegmentRead:
        blocks = items.blocks(item)[: -(-kv_len // self._block_size)]
        begin, end = int(items.query_begin[item]), int(items.query_end[item])
        return SegmentRead(begin, end, kv_len, torch.from_numpy(blocks.copy()))

    def _buckets(self, items: AttentionItems, decodes: Ints, folded: Ints) -> list[DecodeBucket]:
        if len(decodes) == 0:
            return []
        row_items: dict[int, list[int]] = {int(items.query_begin[i]): [i] for i in decodes.tolist()}
        for item in folded.tolist():
            for row in range(int(items.query_begin[item]), int(items.query_end[item])):
                row_items[row].append(item)
        length = {row: int(items.kv_len[list_].sum()) for row, list_ in row_items.items()}
        buckets: list[DecodeBucket] = []
        current: list[int] = []
        for row in sorted(row_items, key=length.__getitem__):
            if len(current) >= _MIN_BUCKET and length[row] > _PADDING * length[current[0]]:
                buckets.append(self._bucket(items, current, row_items))
                current = []
            current.append(row)
        return [*buckets, self._bucket(items, current, row_items)]

    def _bucket(
        self, items: AttentionItems, rows: list[int], row_items: dict[int, list[int]]
    ) -> DecodeBucket:
        seen = [np.concatenate([self._slots(items, i) for i in row_items[row]]) for row in rows]
        width = max(map(len, seen))
        slots = np.empty((len(rows), width), dtype=np.int64)
        bias = np.full((len(rows), width), -np.inf, dtype=np.float32)
        for index, own in enumerate(seen):
            slots[index, : len(own)] = own
            slots[index, len(own) :] = own[-1]
            bias[index, : len(own)] = 0
        return DecodeBucket(
            torch.tensor(rows),
            torch.from_numpy(slots.ravel()),
            torch.from_numpy(bias)[:, None, None, :],
        )

    def _slots(self, items: AttentionItems, item: int) -> Ints:
        """Where an item's tokens lie, [kv_len]."""
        slots: Ints = items.blocks(item)[:, None] * self._block_size + np.arange(self._block_size)
        return slots.ravel()[: items.kv_len[item]]


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """Calls of one step; `chunks` are the query ranges that attend causally to themselves.

    Chunks and buckets together cover every query once, so they write their results; `reads` are
    merged into them.
    """

    rotation: Rotation
    slots: torch.Tensor
    chunks: list[tuple[int, int]]
    buckets: list[DecodeBucket]
    reads: list[SegmentRead]

    def run(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `LayerPlan.run`."""
        query, key, value = rotate_and_write(self.rotation, self.slots, qkv, keys, values)
        num_tokens = len(query)
        grouped = query.view(num_tokens, keys.shape[2], -1, keys.shape[3])
        # Only queries that a shared or earlier segment is merged into need float32 states.
        out = query.new_empty(grouped.shape, dtype=torch.float32 if self.reads else query.dtype)
        lse = query.new_empty(grouped.shape[:3], dtype=torch.float32)
        for begin, end in self.chunks:
            partial, partial_lse = _attend(
                grouped[begin:end], key[begin:end], value[begin:end], causal=True
            )
            out[begin:end], lse[begin:end] = partial, partial_lse
        for bucket in self.buckets:
            partial, partial_lse = _attend_bucket(grouped[bucket.rows], keys, values, bucket)
            out[bucket.rows], lse[bucket.rows] = partial.to(out.dtype), partial_lse
        for read in self.reads:
            segment = slice(read.begin, read.end)
            k = keys[read.blocks].flatten(0, 1)[: read.kv_len]
            v = values[read.blocks].flatten(0, 1)[: read.kv_len]
            merge_state(out[segment], lse[segment], *_attend(grouped[segment], k, v))
        return out.to(query.dtype).view(num_tokens, -1)


def merge_state(
    out: torch.Tensor, lse: torch.Tensor, partial: torch.Tensor, partial_lse: torch.Tensor
) -> None:
    """Join a partial attention into `out` and `lse`, in place.

    Shapes: `out`, `partial` [n, kv_heads, group, head_dim]; the LSEs [n, kv_heads, group], natural
    logarithm, float32. Exact but for rounding (Hydragen, arXiv 2402.05099, section 3.1).
    """
    joint = torch.logaddexp(lse, partial_lse)
    out.mul_(torch.exp(lse - joint).unsqueeze(-1))
    out.addcmul_(partial.to(out.dtype), torch.exp(partial_lse - joint).unsqueeze(-1))
    lse.copy_(joint)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [n, kv_heads, group, d] over keys [length, kv_heads, d], with the LSE.

    The kv heads are the kernel's batch and the heads of a group its heads, all reading the same
    keys through a stride of zero: nothing is repeated in memory.
    """
    group = query.shape[2]
    keys = key.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    values = value.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    out, lse = _FLASH(query.permute(1, 2, 0, 3), keys, values, 0.0, causal)
    return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)


def _attend_bucket(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    bucket: DecodeBucket,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One query a row [n, kv_heads, group, d] over its own slots; the group is the query axis."""
    shape = (len(bucket.rows), -1, *key_cache.shape[2:])
    keys = key_cache.flatten(0, 1).index_select(0, bucket.slots).view(shape).transpose(1, 2)
    values = value_cache.flatten(0, 1).index_select(0, bucket.slots).view(shape).transpose(1, 2)
    bias = bucket.bias.to(query.dtype)
    out, lse = _FLASH(query, keys, values, attn_mask=bias)
    return out, lse
