"""Matrix products with weights packed for the compiled kernels (native/src/linear.cpp)."""

import ctypes
from ctypes import c_int64, c_void_p

import torch
import torch.nn.functional as F

from batchllm.models.linear import Product, pack_torch, pack_torch_int8, round_to_int8
from batchllm.native.kernels import NativeKernels

_OFFSET = 128  # what x is stored with, see linear.cpp


class _PackedLinear(ctypes.Structure):
    """`PackedLinear` of native/src/linear.h."""

    _fields_ = [
        *[(name, c_int64) for name in ("inputs", "outputs")],
        *[(name, c_void_p) for name in ("panels", "scales", "starts", "bias")],
    ]


class NativeProducts:
    """Packs weights for the kernels, or for torch where that is faster.

    Which is with a processor's matrix `tiles` (AMX) where the compiler did not know them, since
    oneDNN has kernels for these (not in float32), and on processors that the kernels were compiled
    for without knowing them. torch's products of a row can depend on how many others there are;
    `always` leaves them out.
    """

    def __init__(self, kernels: NativeKernels, *, tiles: bool, always: bool = False) -> None:
        self._kernels = kernels
        known = always or kernels.target != "portable"
        tiles = tiles and kernels.target != "amx" and not always
        self._own = {torch.bfloat16: known and not tiles, torch.float32: known}
        self._int8 = not tiles

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Pack`."""
        kernels = self._kernels
        is_bfloat16 = weight.dtype == torch.bfloat16
        if not self._own[weight.dtype] or (is_bfloat16 and weight.shape[1] % 2):
            return pack_torch(weight, bias)
        packed = _Packed(kernels, weight, bias)
        widened_bytes = kernels.widened_bytes if is_bfloat16 else 0

        def product(x: torch.Tensor) -> torch.Tensor:
            out = packed.output_for(x)
            widened = torch.empty(x.numel() * widened_bytes, dtype=torch.uint8)
            kernels.linear(
                is_bfloat16,
                len(x),
                packed.address,
                *[tensor.data_ptr() for tensor in (x, widened, out)],
            )
            return out

        return product

    def pack_int8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Pack`."""
        kernels = self._kernels
        if not self._int8 or weight.shape[1] % 4:
            return pack_torch_int8(weight, bias)
        rounded, scales = round_to_int8(weight)
        if kernels.rounded_bytes == 2:  # the order that its inputs are taken in, see linear.h
            rounded = rounded.view(-1, 4)[:, [0, 2, 1, 3]].view(rounded.shape)
        packed = _Packed(kernels, rounded, bias, scales)

        def product(x: torch.Tensor) -> torch.Tensor:
            out = packed.output_for(x)
            rows = torch.empty(x.numel() * kernels.rounded_bytes, dtype=torch.uint8)
            row_scales = torch.empty(len(x))
            kernels.linear_int8(
                x.dtype == torch.bfloat16,
                len(x),
                packed.address,
                *[tensor.data_ptr() for tensor in (x, rows, row_scales, out)],
            )
            return out

        return product


class _Packed:
    """A weight's panels, and what `PackedLinear` points to, kept alive."""

    def __init__(
        self,
        kernels: NativeKernels,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scales: torch.Tensor | None = None,
    ) -> None:
        self._outputs, self._inputs = weight.shape
        width = kernels.panel_width
        more = -self._outputs % width
        words = weight.contiguous().view(torch.int32)  # a group of inputs is a word
        panels = F.pad(words, (0, 0, 0, more)).view(-1, width, words.shape[1])
        starts = None
        if scales is not None:
            starts = F.pad(-_OFFSET * weight.sum(dim=1, dtype=torch.int32), (0, more))
            scales = F.pad(scales, (0, more))
        if bias is not None:
            bias = F.pad(bias.float(), (0, more))
        self._tensors = (panels.transpose(1, 2).contiguous(), scales, starts, bias)
        self._struct = _PackedLinear(
            self._inputs,
            self._outputs,
            *[None if tensor is None else tensor.data_ptr() for tensor in self._tensors],
        )
        self.address = ctypes.byref(self._struct)

    def output_for(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_contiguous() and x.shape[1] == self._inputs, (x.shape, self._inputs)
        return x.new_empty(len(x), self._outputs)
