"""What a model computes with: products, and what lies between them."""

from typing import Protocol

import torch
import torch.nn.functional as F

from batchllm.models.float8_linear import pack_float8
from batchllm.models.linear import Product, pack_torch, pack_torch_int8


class Operations(Protocol):
    """Products, and row-wise operations on [rows, size] tensors; sums are taken in float32."""

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """A product with this weight; see `Pack`."""
        ...

    def pack_int8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """The same in int8, a scale for each output and for each row."""
        ...

    def pack_float8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """The same in float8 (e4m3)."""
        ...

    def pack_gated(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantization: str | None
    ) -> Product | None:
        """A product and `silu_and_multiply` in one, [rows, inputs] to [rows, outputs / 2].

        None where they are two; `quantization` is None, int8 or fp8.
        """
        ...

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add `delta` to `hidden` in place; return `hidden` / its root mean square * `weight`.

        `delta` is given up: what is returned may lie in its memory.
        """
        ...

    def silu_and_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(left half) x right half: [rows, 2 * size] to [rows, size]."""
        ...

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """The first largest of each row, an integer [rows].

        -1 where there is a NaN, or the largest is infinite.
        """
        ...


class TorchOperations:
    """In torch: runs everywhere, and is what the compiled ones are held against."""

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return pack_torch(weight, bias)

    def pack_int8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return pack_torch_int8(weight, bias)

    def pack_float8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return pack_float8(weight, bias, pack_torch)

    def pack_gated(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantization: str | None
    ) -> None:
        """See `Operations`."""

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See `Operations`."""
        if delta is not None:
            hidden.add_(delta)
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, eps)

    def silu_and_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Operations`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """See `Operations`."""
        largest, where = logits.max(dim=-1)  # a NaN counts as the largest
        return where.masked_fill(~largest.isfinite(), -1)
