"""What a model computes between its matrix products."""

from typing import Protocol

import torch
import torch.nn.functional as F


class Operations(Protocol):
    """Row-wise operations on [rows, size] tensors, in their dtype; sums are taken in float32."""

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add `delta` to `hidden` in place; return `hidden` / its root mean square * `weight`."""
        ...

    def silu_and_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(left half) x right half: [rows, 2 * size] to [rows, size]."""
        ...

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """The first largest of each row, an integer [rows]."""
        ...


class TorchOperations:
    """In torch: runs everywhere, and is what the compiled ones are held against."""

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
        return logits.argmax(dim=-1)
