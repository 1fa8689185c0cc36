"""Matrix products with weights that are packed once, in torch: bfloat16, float32, and int8."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F

from batchllm.models.smoothing import column_peaks

Product = Callable[[torch.Tensor], torch.Tensor]
"""[rows, inputs] to [rows, outputs], in the dtype of what goes in."""

Pack = Callable[[torch.Tensor, torch.Tensor | None], Product]
"""A product with a weight [outputs, inputs] and a bias [outputs]; neither need be kept."""


@runtime_checkable
class RankingProduct(Protocol):
    """A product that can find its largest outputs without writing them all."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Product`."""
        ...

    def argmax(self, x: torch.Tensor) -> torch.Tensor | None:
        """`Operations.argmax` of the outputs, int32 [rows]; None where it cannot after all."""
        ...


@runtime_checkable
class StripsProduct(Protocol):
    """A product that can take rows as they lie between the products of a layer, in strips."""

    def in_strips(self, x: torch.Tensor, rows: int) -> torch.Tensor | None:
        """Of the first `rows` of x [whole strips, inputs]; None where it cannot after all."""
        ...


INT8_MOST = 127  # of 128 steps each way, so that the scale is symmetric


class Linear:
    """x @ weight.T + bias.

    `weight` is filled in place, [outputs, inputs]; after `pack` it is gone and only the packed copy
    is left. What smoothing needs to know of the inputs is observed before.
    """

    def __init__(
        self, inputs: int, outputs: int, *, dtype: torch.dtype, bias: bool = False
    ) -> None:
        self.weight: torch.Tensor | None = torch.empty(outputs, inputs, dtype=dtype)
        self.bias = torch.empty(outputs, dtype=dtype) if bias else None
        self.input_peaks: torch.Tensor | None = None
        self._product: Product | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, inputs] to [rows, outputs]."""
        if self._product is not None:
            return self._product(x)
        assert self.weight is not None
        if self.input_peaks is not None:
            self.see(x)
        return F.linear(x, self.weight, self.bias)

    def argmax(self, x: torch.Tensor) -> torch.Tensor | None:
        """See `RankingProduct`; None where the product is none."""
        return self._product.argmax(x) if isinstance(self._product, RankingProduct) else None

    @property
    def product(self) -> Product:
        """What the weight was packed as."""
        assert self._product is not None, "not packed yet"
        return self._product

    def observe(self) -> None:
        """From now on keep the largest of each input, without sign, in `input_peaks`."""
        assert self.weight is not None, "packed already"
        self.input_peaks = torch.zeros(self.weight.shape[1])

    def see(self, x: torch.Tensor) -> None:
        """Let rows [rows, inputs] count among the inputs observed."""
        assert self.input_peaks is not None, "not observing"
        self.input_peaks = torch.maximum(self.input_peaks, column_peaks(x))

    def weight_peaks(self) -> torch.Tensor:
        """The largest weight of each input, without sign, float32 [inputs]."""
        assert self.weight is not None, "packed already"
        return column_peaks(self.weight)

    def pack(self, pack: Pack) -> None:
        """Pack the weight and give it up."""
        assert self.weight is not None, "packed already"
        self._product = pack(self.weight, self.bias)
        self.weight = None


class GatedLinear(Linear):
    """silu(x @ gate.T) * (x @ up.T); `weight` is [gate; up].

    `activate` takes both from [rows, 2 * size] to [rows, size] where no product does it as well.
    """

    def __init__(
        self,
        inputs: int,
        size: int,
        *,
        dtype: torch.dtype,
        activate: Callable[[torch.Tensor], torch.Tensor],
        bias: bool = False,
    ) -> None:
        super().__init__(inputs, 2 * size, dtype=dtype, bias=bias)
        self._activate = activate
        self._is_gated = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, inputs] to [rows, size]."""
        out = super().__call__(x)
        return out if self._is_gated else self._activate(out)

    def pack_gated(self, product: Product) -> None:
        """Take a product that does all of it instead of the weight."""
        self._product = product
        self._is_gated = True
        self.weight = None


def pack_torch(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """For oneDNN, where torch's can and gains by it, else as it is.

    oneDNN reads a packed weight in order, which is worth most where rows are few: 1.5 times at 16
    rows, 1.1 at 256 (two AVX-512 cores, bfloat16).
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not can_pack():
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def product(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return out

    return product


def pack_torch_int8(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """In eight bits, a scale for each output and for each row of x; sums are exact."""
    rounded, scales = round_to_int8(weight)

    def product(x: torch.Tensor) -> torch.Tensor:
        rows, row_scales = round_to_int8(x)
        out = torch._int_mm(rows, rounded.T).float() * (row_scales[:, None] * scales)
        return (out if bias is None else out + bias.float()).to(x.dtype)

    return product


def round_to_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row as int8 times a scale: [n, size] to int8 [n, size] and float32 [n]."""
    rows = rows.float()
    peak = rows.abs().amax(dim=1)
    inverse = torch.where(peak > 0, INT8_MOST / peak, 0.0)
    return (rows * inverse[:, None]).round().to(torch.int8), peak / INT8_MOST


def can_pack() -> bool:
    """Whether this torch and processor have oneDNN's bfloat16 products over packed weights."""
    mkldnn = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(mkldnn, "_reorder_linear_weight")
        and hasattr(mkldnn, "_linear_pointwise")
        and bool(mkldnn._is_mkldnn_bf16_supported())
    )
