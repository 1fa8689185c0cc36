"""Matrix products with weights that are packed once for oneDNN."""

import torch
import torch.nn.functional as F


class Linear:
    """x @ weight.T + bias.

    `weight` is filled in place, [outputs, inputs]; after `pack` it is gone and only the packed copy
    is left. Packing orders the weight in memory as oneDNN's product reads it, which is worth most
    where rows are few: 1.5 times at 16 rows, 1.1 at 256 (two AVX-512 cores, bfloat16).
    """

    def __init__(
        self, inputs: int, outputs: int, *, dtype: torch.dtype, bias: bool = False
    ) -> None:
        self.weight: torch.Tensor | None = torch.empty(outputs, inputs, dtype=dtype)
        self.bias = torch.empty(outputs, dtype=dtype) if bias else None
        self._packed: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, inputs] to [rows, outputs]."""
        if self._packed is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self.bias, "none", [], ""
        )
        return product

    def pack(self) -> None:
        """Pack the weight, where torch's oneDNN can and gains by it, and give it up."""
        assert self.weight is not None, "packed already"
        if self.weight.dtype == torch.bfloat16 and can_pack():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            self.weight = None


def can_pack() -> bool:
    """Whether this torch and processor have oneDNN's bfloat16 products over packed weights."""
    mkldnn = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(mkldnn, "_reorder_linear_weight")
        and hasattr(mkldnn, "_linear_pointwise")
        and bool(mkldnn._is_mkldnn_bf16_supported())
    )
