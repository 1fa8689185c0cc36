"""What lies between layers' attention in one call, or all layers in one (native/src/block.cpp)."""

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch

from batchllm.models.linear import Product
from batchllm.models.native_linear import NativeProduct
from batchllm.models.operations import CompiledAttend, LayerParts
from batchllm.native.kernels import NativeKernels, whole_strips


class _Block(ctypes.Structure):
    """`Block` of native/src/block.h."""

    _fields_ = [
        ("hidden_size", c_int64),
        ("epsilon", c_float),
        *[(name, c_int32) for name in ("is_bfloat16", "is_int8")],
        *[(name, c_void_p) for name in ("output", "post_norm", "gate_up", "down")],
        *[(name, c_void_p) for name in ("input_norm", "qkv")],
    ]


class _Memory(ctypes.Structure):
    """`BlockMemory` of native/src/block.h."""

    _fields_ = [
        *[(name, c_void_p) for name in ("hidden", "normed", "delta", "gate_up", "inner", "qkv")],
        *[(name, c_void_p) for name in ("scratch", "row_scales")],
    ]


class NativeBlocks:
    """The blocks behind the attentions of `layers`, which are kept; all products are of a kind."""

    def __init__(self, kernels: NativeKernels, layers: Sequence[LayerParts], eps: float) -> None:
        self._kernels = kernels
        self._layers = layers
        products = [_native(product) for layer in layers for product in layer.products()]
        first, norm = layers[0], layers[0].input_norm
        self._scratch_bytes = max(p.packed.inputs * p.scratch_bytes for p in products)
        self._qkv_size = _native(first.qkv).packed.outputs
        self._inner_size = _native(first.down).packed.inputs
        self._gated = _native(first.gate_up).packed.gated
        blocks = [
            _Block(
                norm.numel(),
                eps,
                norm.dtype == torch.bfloat16,
                products[0].is_int8,
                _native(layer.output).packed.pointer,
                layer.post_norm.data_ptr(),
                _native(layer.gate_up).packed.pointer,
                _native(layer.down).packed.pointer,
                None if following is None else following.input_norm.data_ptr(),
                None if following is None else _native(following.qkv).packed.pointer,
            )
            for layer, following in zip(layers, [*layers[1:], None], strict=True)
        ]
        self._blocks = (_Block * len(blocks))(*blocks)

    @classmethod
    def of(
        cls, kernels: NativeKernels, layers: Sequence[LayerParts], eps: float
    ) -> "NativeBlocks | None":
        """None where some product is not the kernels', or they are of two kinds."""
        products = [product for layer in layers for product in layer.products()]
        kinds = {p.is_int8 if isinstance(p, NativeProduct) else None for p in products}
        return cls(kernels, layers, eps) if len(kinds) == 1 and None not in kinds else None

    def start(self, hidden: torch.Tensor) -> "NativePass":
        """See `Blocks`."""
        assert hidden.is_contiguous()
        rows, size = hidden.shape
        inner, room = self._inner_size, whole_strips(rows)
        gate_up = 0 if self._gated else 2 * inner
        tensors = [
            hidden,
            *[hidden.new_empty(room, each) for each in (size, size, gate_up, inner)],
            hidden.new_empty(rows, self._qkv_size),
            torch.empty(room * self._scratch_bytes, dtype=torch.uint8),
            torch.empty(rows),
        ]
        return NativePass(self._kernels, self._blocks, tensors)


class NativePass:
    """One step's way through the blocks, in memory of its own."""

    def __init__(
        self, kernels: NativeKernels, blocks: ctypes.Array[_Block], tensors: list[torch.Tensor]
    ) -> None:
        self._kernels = kernels
        self._blocks = blocks
        self._tensors = tensors  # what `_memory` points to
        self._memory = _Memory(*[tensor.data_ptr() for tensor in tensors])
        self._qkv = tensors[5]

    def run_all(self, qkv: torch.Tensor, attend: CompiledAttend) -> torch.Tensor | None:
        """See `BlockPass`."""
        count = len(self._blocks) - 1
        if count == 0:
            return qkv.flatten(1)
        return self._qkv if self._run_first(count, qkv, attend) else None

    def run_through(self, qkv: torch.Tensor, attend: CompiledAttend) -> bool:
        """See `BlockPass`."""
        return self._run_first(len(self._blocks), qkv, attend)

    def _run_first(self, count: int, qkv: torch.Tensor, attend: CompiledAttend) -> bool:
        calls = attend.calls([qkv, *[self._qkv.view(qkv.shape)] * (count - 1)])
        if calls is None or calls.kernels is not self._kernels:
            return False
        self._kernels.layers(
            calls.step, calls.layers, self._blocks, ctypes.byref(self._memory), count
        )
        return True

    def run(self, layer: int, attended: torch.Tensor) -> torch.Tensor:
        """See `BlockPass`."""
        assert attended.is_contiguous() and attended.shape[0] == self._qkv.shape[0]
        self._kernels.block(
            ctypes.byref(self._blocks[layer]),
            ctypes.byref(self._memory),
            attended.shape[0],
            attended.data_ptr(),
        )
        return self._qkv


def _native(product: Product) -> NativeProduct:
    assert isinstance(product, NativeProduct)
    return product
