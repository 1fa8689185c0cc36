"""What a model computes with on a GPU, in torch."""

import torch
import torch.nn.functional as F

from batchllm.models.float8_linear import pack_scaled_mm
from batchllm.models.linear import Product, pack_torch, round_to_int8
from batchllm.models.operations import TorchOperations

_MORE_THAN_ROWS = 16  # `torch._int_mm` on CUDA wants more rows than this,
_MULTIPLE = 8  # and inputs and outputs in multiples of this


class DeviceOperations:
    """`Operations` (models/operations.py) whose products a GPU can do."""

    def __init__(self) -> None:
        rows = TorchOperations()
        self.add_rms_norm = rows.add_rms_norm
        self.silu_and_multiply = rows.silu_and_multiply
        self.pack_gated = rows.pack_gated
        self.pack_blocks = rows.pack_blocks
        self.argmax = rows.argmax

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return pack_torch(weight, bias)

    def pack_int8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return pack_device_int8(weight, bias)

    def pack_float8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return pack_scaled_mm(weight, bias)


def pack_device_int8(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """As `pack_torch_int8`, filled up with zeros to sizes that the GPU's products take."""
    outputs, inputs = weight.shape
    rounded, scales = round_to_int8(weight)
    more_inputs = -inputs % _MULTIPLE
    rounded = F.pad(rounded, (0, more_inputs, 0, -outputs % _MULTIPLE))

    def product(x: torch.Tensor) -> torch.Tensor:
        rows, row_scales = round_to_int8(x)
        more_rows = max(_MORE_THAN_ROWS + 1 - len(x), 0)
        sums = torch._int_mm(F.pad(rows, (0, more_inputs, 0, more_rows)), rounded.T)
        out = sums[: len(x), :outputs].float() * (row_scales[:, None] * scales)
        return (out if bias is None else out + bias.float()).to(x.dtype)

    return product
