"""Matrix products in float8 (e4m3): a scale for each output and for each row of x.

Where a device multiplies float8 (compute capability 8.9 and later), torch's `_scaled_mm` does it.
Where none does, the rounded values are multiplied in a wider type, which holds them exactly. That
is no faster, but the answers are the same, so that the cost in quality can be seen anywhere.
"""

import torch

from batchllm.models.linear import Pack, Product

FLOAT8 = torch.float8_e4m3fn
_MOST = torch.finfo(FLOAT8).max
_MULTIPLE = 16  # of inputs and outputs, for `_scaled_mm`


def round_to_float8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row as float8 times a scale: [n, size] to float8_e4m3fn [n, size] and float32 [n, 1]."""
    rows = rows.float()
    peak = rows.abs().amax(dim=1, keepdim=True)
    inverse = torch.where(peak > 0, _MOST / peak, 0.0)
    return (rows * inverse).clamp(-_MOST, _MOST).to(FLOAT8), peak / _MOST


def pack_float8(weight: torch.Tensor, bias: torch.Tensor | None, pack: Pack) -> Product:
    """A product of rounded values, for which `pack` makes one of wider ones; see `Pack`."""
    rounded, scales = round_to_float8(weight)
    wide = pack(rounded.to(weight.dtype), None)
    scales = scales.view(-1)

    def product(x: torch.Tensor) -> torch.Tensor:
        rows, row_scales = round_to_float8(x)
        out = wide(rows.to(x.dtype)).float() * row_scales * scales
        return (out if bias is None else out + bias.float()).to(x.dtype)

    return product


def pack_scaled_mm(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """The same by a GPU's float8 products, as far as they can do the sizes."""
    if weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE:
        return pack_float8(weight, bias, _plain)
    rounded, scales = round_to_float8(weight)
    columns, column_scales = rounded.t(), scales.t().contiguous()

    def product(x: torch.Tensor) -> torch.Tensor:
        rows, row_scales = round_to_float8(x)
        out: torch.Tensor = torch._scaled_mm(
            rows, columns, row_scales, column_scales, out_dtype=x.dtype, use_fast_accum=True
        )
        return out if bias is None else out.add_(bias)

    return product


def _plain(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    return lambda x: torch.nn.functional.linear(x, weight, bias)
