"""Attention by the compiled kernels: one parallel call a layer."""

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray

from batchllm.errors import UsageError
from batchllm.models.operations import AttentionCalls
from batchllm.models.rope import Rotation
from batchllm.native.kernels import NativeKernels, load_kernels, whole_strips
from batchllm.runner.kv_cache import kv_row_values
from batchllm.runner.model_input import AttentionItems, ModelInput
from batchllm.runner.staging import Put

Ints = NDArray[np.int64]

_WIDTH = 16  # the widest vectors have so many lanes; a block must be whole ones of them
_TILE_ROWS = 96  # queries times heads of a group: their state stays in the first-level cache
_PASS_KEYS = 256
_PASS_KEYS_DETERMINISTIC = 64  # the fewer, the more can be shared, and the slower it is
_UNITS_A_THREAD = 4  # at least so many, as far as there are queries, so that threads end together


class _Step(ctypes.Structure):
    """`Step` of native/src/attention.h."""

    _fields_ = [
        *[(name, c_int64) for name in ("num_tokens", "num_tiles", "num_blocks")],
        *[(name, c_int32) for name in ("num_heads", "num_kv_heads", "head_dim")],
        *[(name, c_int32) for name in ("block_size", "tile_size", "is_bfloat16")],
        *[(name, c_int32) for name in ("pass_keys", "kv_is_int8")],
        *[(name, c_void_p) for name in ("slots", "cos", "sin")],
        *[(name, c_void_p) for name in ("query_begin", "query_end", "kv_len", "own")],
        *[(name, c_void_p) for name in ("block_offsets", "block_ids")],
        *[(name, c_void_p) for name in ("tile_begin", "tile_order", "tile_offsets", "tile_items")],
    ]


class _Layer(ctypes.Structure):
    """`Layer` of native/src/attention.h."""

    _fields_ = [
        *[(name, c_void_p) for name in ("qkv", "keys", "values", "out")],
        ("out_in_strips", c_int64),
    ]


@dataclass(frozen=True, slots=True)
class Tiles:
    """Neighbouring queries that are attended together, and the items each tile reads.

    Tile t is the queries `[begin[t], begin[t + 1])` and reads `items[offsets[t]:offsets[t + 1]]`;
    `order` [num_tiles] has the dearest first.
    """

    begin: Ints
    order: Ints
    offsets: Ints
    items: Ints

    @classmethod
    def of(cls, items: AttentionItems, num_tokens: int, size: int) -> "Tiles":
        """Cut `num_tokens` queries into tiles of at most `size`, where least is read twice.

        A cut through an item makes two tiles read it, so cuts go to the ends of shared ones.
        """
        begin = _cuts(items, num_tokens, size)
        num_tiles = len(begin) - 1
        first = np.searchsorted(begin, items.query_begin, side="right") - 1
        count = np.searchsorted(begin, items.query_end, side="left") - first
        item = np.repeat(np.arange(len(items)), count)
        tile = np.arange(len(item)) - np.repeat(np.cumsum(count) - count - first, count)
        start = np.maximum(items.query_begin[item], begin[tile])
        end = np.minimum(items.query_end[item], begin[tile + 1])
        unseen = np.where(items.own[item], items.query_end[item] - end, 0)
        cost = (end - start) * (items.kv_len[item] - unseen)
        by_tile = np.lexsort((items.kv_start[item], tile))  # each context from its beginning
        return cls(
            begin=begin,
            order=np.argsort(-np.bincount(tile, cost, num_tiles), kind="stable"),
            offsets=np.concatenate([[0], np.cumsum(np.bincount(tile, minlength=num_tiles))]),
            items=item[by_tile],
        )

    def with_any(self, queries: Ints) -> Ints:
        """The tiles in which any of these queries are, the dearest first."""
        wanted = np.zeros(len(self.order), dtype=np.bool_)
        wanted[np.searchsorted(self.begin, queries, side="right") - 1] = True
        return self.order[wanted[self.order]]


def _cuts(items: AttentionItems, num_tokens: int, size: int) -> Ints:
    """Where tiles begin, and `num_tokens`; each at the cheapest place in its second half."""
    crossing = np.zeros(num_tokens + 1, dtype=np.int64)  # tokens of items that a cut there divides
    np.add.at(crossing, items.query_begin + 1, items.kv_len)
    np.add.at(crossing, items.query_end, -items.kv_len)
    crossing = np.cumsum(crossing)
    cuts = [0]
    while cuts[-1] + size < num_tokens:
        least, most = cuts[-1] + size // 2 + 1, cuts[-1] + size
        choice = crossing[least : most + 1]
        cuts.append(most - int(np.argmin(choice[::-1])))  # the last of the cheapest
    return np.array([*cuts, num_tokens])


class NativeBackend:
    """Attention over the prefix tree in one parallel call a layer (native/src/attention.cpp).

    Keys and values lie in their block as the kernel's products want them, not token after token.
    The cache is of the model's dtype or, with half or a quarter of the bytes, of int8, whose rows
    have scales (`kv_row_values`).
    `deterministic` takes so few keys at a time that segments can begin at multiples of them; then
    a query's result does not depend on how its context is cut into segments.

    Raises:
        UsageError: no kernels were compiled, or they cannot do these sizes.
    """

    def __init__(
        self,
        block_size: int,
        head_dim: int,
        kernels: NativeKernels | None = None,
        *,
        deterministic: bool = False,
    ) -> None:
        kernels = kernels or load_kernels()
        if kernels is None:
            raise UsageError(
                "no kernels were compiled when batchllm was installed; install g++, then batchllm "
                "again"
            )
        if block_size % _WIDTH or block_size & (block_size - 1):
            raise UsageError(
                f"the compiled kernels need a block_size that is a power of two, {_WIDTH} or more; "
                f"it is {block_size}"
            )
        if head_dim % _WIDTH:
            raise UsageError(
                f"the compiled kernels need a head_dim that is a multiple of {_WIDTH}; it is "
                f"{head_dim}"
            )
        self.name = f"native ({kernels.target})"
        self.kernels = kernels
        self._block_size = block_size
        self._pass_keys = _PASS_KEYS_DETERMINISTIC if deterministic else _PASS_KEYS
        self.granularity = self._pass_keys if deterministic else 1

    def plan(
        self, step: ModelInput, rotation: Rotation, put: Put = torch.from_numpy
    ) -> "NativePlan":
        """Everything but the tiles is the step's own arrays."""
        return NativePlan(self.kernels, step, rotation, self._block_size, self._pass_keys)


class NativePlan:
    """A step for the kernel. The tiles depend on the heads, so they are cut at the first layer."""

    def __init__(
        self,
        kernels: NativeKernels,
        step: ModelInput,
        rotation: Rotation,
        block_size: int,
        pass_keys: int,
    ) -> None:
        self._kernels = kernels
        self._input = step
        self._rotation = rotation
        self._block_size = block_size
        self._pass_keys = pass_keys
        self._tiles: Tiles | None = None  # with the step and the rotation: what `_step` points to
        self._step = _Step()

    def run(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `LayerPlan.run`."""
        out = self._prepare(qkv, keys, values)
        self._attend(self._step, qkv, keys, values, out)
        return out[: len(qkv)]

    def run_last(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `CompiledPlan`."""
        out = self._prepare(qkv, keys, values)
        assert self._tiles is not None
        order = self._tiles.with_any(self._input.sample_rows)
        step = _Step.from_buffer_copy(self._step)
        step.num_tiles, step.tile_order = len(order), order.ctypes.data
        self._attend(step, qkv, keys, values, out)
        return out[: len(qkv)]

    def _attend(self, step: _Step, *tensors: torch.Tensor) -> None:
        layer = _Layer(*[tensor.data_ptr() for tensor in tensors])
        self._kernels.attention(ctypes.byref(step), ctypes.byref(layer))

    def calls(
        self, qkv: Sequence[torch.Tensor], keys: torch.Tensor, values: torch.Tensor
    ) -> AttentionCalls:
        """See `CompiledPlan`."""
        assert keys.is_contiguous() and values.is_contiguous()
        out = self._prepare(qkv[0], keys[0], values[0])
        layer_bytes = keys.stride(0) * keys.itemsize
        layers = [
            _Layer(
                layer_qkv.data_ptr(),
                keys.data_ptr() + i * layer_bytes,
                values.data_ptr() + i * layer_bytes,
                out.data_ptr(),
            )
            for i, layer_qkv in enumerate(qkv)
        ]
        array = (_Layer * len(layers))(*layers)
        step, memory = self._step, (self, array, qkv, out)
        return AttentionCalls(
            self._kernels, ctypes.addressof(step), ctypes.addressof(array), memory
        )

    def _prepare(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Cut the tiles if they are not; returns memory for a layer's output, of whole strips."""
        assert qkv.is_contiguous() and keys.is_contiguous() and values.is_contiguous()
        assert keys.dtype == values.dtype and keys.dtype in (qkv.dtype, torch.int8), keys.dtype
        num_tokens, width, head_dim = qkv.shape
        assert keys.shape[3] == kv_row_values(head_dim, keys.dtype), keys.shape
        num_heads = width - 2 * keys.shape[2]
        if self._tiles is None:
            self._tiles = self._cut(num_heads, head_dim, keys, qkv.dtype)
        return qkv.new_empty(whole_strips(num_tokens), num_heads * head_dim)

    def _cut(self, num_heads: int, head_dim: int, keys: torch.Tensor, dtype: torch.dtype) -> Tiles:
        items, num_tokens = self._input.items, len(self._input.token_ids)
        num_blocks, _, num_kv_heads, _ = keys.shape
        even = num_tokens * num_kv_heads // (_UNITS_A_THREAD * torch.get_num_threads())
        tiles = Tiles.of(
            items, num_tokens, max(1, min(even, _TILE_ROWS * num_kv_heads // num_heads))
        )
        step = self._step
        step.num_tokens, step.num_tiles = num_tokens, len(tiles.order)
        step.num_blocks = num_blocks
        step.tile_size = int(np.diff(tiles.begin).max())
        step.num_heads, step.num_kv_heads, step.head_dim = num_heads, num_kv_heads, head_dim
        step.block_size, step.is_bfloat16 = self._block_size, dtype == torch.bfloat16
        step.pass_keys, step.kv_is_int8 = self._pass_keys, keys.dtype == torch.int8
        step.cos, step.sin = self._rotation.cos.data_ptr(), self._rotation.sin.data_ptr()
        arrays = {name: getattr(items, name) for name in ("query_begin", "query_end", "kv_len")}
        arrays |= {name: getattr(items, name) for name in ("own", "block_offsets", "block_ids")}
        arrays |= {f"tile_{f.name}": getattr(tiles, f.name) for f in fields(tiles)}
        for name, array in (arrays | {"slots": self._input.slots}).items():
            assert array.flags.c_contiguous and array.itemsize == (1 if name == "own" else 8), name
            setattr(step, name, array.ctypes.data)
        return tiles
