"""What a model computes with: products, and what lies between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from batchllm.models.float8_linear import pack_float8
from batchllm.models.linear import Product, pack_torch, pack_torch_int8
from batchllm.native.kernels import NativeKernels


@dataclass(frozen=True, slots=True)
class LayerParts:
    """A layer's packed products and its norms' weights [hidden_size].

    `gate_up` takes the activation along if it is `gated`.
    """

    input_norm: torch.Tensor
    qkv: Product
    output: Product
    post_norm: torch.Tensor
    gate_up: Product
    down: Product

    def products(self) -> tuple[Product, ...]:
        """All four."""
        return self.qkv, self.output, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class AttentionCalls:
    """A step's attention as kernels call it: addresses of `Step` and of `Layer`s, one a layer.

    See native/src/attention.h. `memory` is what lies there, and what that points to. The cache is
    laid out for `kernels`, which alone may be called with it.
    """

    kernels: NativeKernels
    step: int
    layers: int
    memory: object


@runtime_checkable
class CompiledAttend(Protocol):
    """Attention that kernels can call without coming back to Python between layers."""

    def calls(self, qkv: Sequence[torch.Tensor]) -> AttentionCalls | None:
        """For as many layers as [n, heads + 2 kv_heads, d] are given; None where it can't."""
        ...


class BlockPass(Protocol):
    """One step's way through the blocks between its layers' attentions."""

    def run_all(self, qkv: torch.Tensor, attend: CompiledAttend) -> torch.Tensor | None:
        """From the first layer's qkv to the last one's, with all attention between them.

        None where that takes several calls.
        """
        ...

    def run_through(self, qkv: torch.Tensor, attend: CompiledAttend) -> bool:
        """From the first layer's qkv through all layers, to what these make of the hidden states.

        False, and nothing done, where that takes several calls.
        """
        ...

    def run(self, layer: int, attended: torch.Tensor) -> torch.Tensor:
        """From a layer's attention [rows, heads * head_dim] to the next one's qkv.

        Which is [rows, (heads + 2 kv_heads) * head_dim], in the same memory each time.
        """
        ...


class Blocks(Protocol):
    """Those blocks, of all layers."""

    def start(self, hidden: torch.Tensor) -> BlockPass:
        """Begin a pass; `hidden` [rows, hidden_size] is updated in place."""
        ...


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

    def pack_blocks(self, layers: Sequence[LayerParts], eps: float) -> Blocks | None:
        """What lies between the attentions of `layers`, each time in one call.

        None where it is several.
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

    def pack_blocks(self, layers: Sequence[LayerParts], eps: float) -> None:
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
