"""A model's operations by FlashInfer's kernels: between products one pass over memory each."""

from collections.abc import Sequence
from typing import Any

import torch

from batchllm.flashinfer_library import load_flashinfer
from batchllm.models.linear import Product
from batchllm.models.operations import LayerParts, Operations

_DTYPES = (torch.bfloat16, torch.float16)


class FlashInferOperations:
    """`Operations` (models/operations.py) on a GPU; products, and what is not 16 bits, by `rest`.

    What is normalised is the sum with `delta` before it is rounded; torch takes it after.

    Raises:
        UsageError: FlashInfer cannot run here.
    """

    def __init__(self, rest: Operations, library: Any = None) -> None:  # noqa: ANN401
        self._library = load_flashinfer() if library is None else library
        self._rest = rest

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return self._rest.pack(weight, bias)

    def pack_int8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return self._rest.pack_int8(weight, bias)

    def pack_float8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return self._rest.pack_float8(weight, bias)

    def pack_gated(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantization: str | None
    ) -> Product | None:
        """See `Operations`."""
        return self._rest.pack_gated(weight, bias, quantization)

    def pack_blocks(self, layers: Sequence[LayerParts], eps: float) -> None:
        """See `Operations`."""

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See `Operations`."""
        if not _can_run(hidden):
            return self._rest.add_rms_norm(hidden, delta, weight, eps)
        if delta is None:
            normed: torch.Tensor = self._library.rmsnorm(hidden, weight, eps)
            return normed
        self._library.fused_add_rmsnorm(delta, hidden, weight, eps)
        return delta

    def silu_and_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Operations`."""
        if not _can_run(gate_up):
            return self._rest.silu_and_multiply(gate_up)
        out: torch.Tensor = self._library.silu_and_mul(gate_up)
        return out

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """See `Operations`."""
        return self._rest.argmax(logits)


def _can_run(rows: torch.Tensor) -> bool:
    """A step may have no rows to sample; a launch of nothing is an error."""
    return rows.dtype in _DTYPES and len(rows) > 0
