"""A model's operations, compiled: between its products one pass over memory each."""

from collections.abc import Sequence

import torch

from batchllm.models.float8_linear import pack_float8
from batchllm.models.linear import Product
from batchllm.models.native_blocks import NativeBlocks
from batchllm.models.native_linear import NativeProducts
from batchllm.models.operations import LayerParts
from batchllm.native.kernels import NO_STRIPS, NativeKernels, only_torch_has_tiles


class NativeOperations:
    """`Operations` (models/operations.py) on contiguous bfloat16 or float32 tensors.

    With `deterministic`, what becomes of a row never depends on how many others there are.
    """

    def __init__(
        self, kernels: NativeKernels, *, tiles: bool | None = None, deterministic: bool = False
    ) -> None:
        self._kernels = kernels
        tiles = only_torch_has_tiles() if tiles is None else tiles
        self._products = NativeProducts(kernels, tiles=tiles, always=deterministic)

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return self._products.pack(weight, bias)

    def pack_int8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return self._products.pack_int8(weight, bias)

    def pack_float8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return pack_float8(weight, bias, self._products.pack)

    def pack_gated(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantization: str | None
    ) -> Product | None:
        """See `Operations`."""
        return self._products.pack_gated(weight, bias, quantization)

    def pack_blocks(self, layers: Sequence[LayerParts], eps: float) -> NativeBlocks | None:
        """See `Operations`."""
        return NativeBlocks.of(self._kernels, layers, eps)

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See `Operations`."""
        out = torch.empty_like(hidden)
        self._kernels.add_rms_norm(
            _is_bfloat16(hidden, weight, *([] if delta is None else [delta])),
            *hidden.shape,
            eps,
            hidden.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            NO_STRIPS,
        )
        return out

    def silu_and_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Operations`."""
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        self._kernels.silu_and_multiply(
            _is_bfloat16(gate_up), rows, size, gate_up.data_ptr(), out.data_ptr()
        )
        return out

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """See `Operations`."""
        out = torch.empty(logits.shape[0], dtype=torch.int32)
        self._kernels.argmax(_is_bfloat16(logits), *logits.shape, logits.data_ptr(), out.data_ptr())
        return out


def _is_bfloat16(*tensors: torch.Tensor) -> bool:
    dtype = tensors[0].dtype
    assert dtype in (torch.bfloat16, torch.float32), dtype
    assert all(t.is_contiguous() and t.dtype == dtype for t in tensors)
    return dtype == torch.bfloat16
