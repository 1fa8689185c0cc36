"""Matrix products with weights packed for the compiled kernels (native/src/linear.cpp)."""

import ctypes
from ctypes import c_int64, c_void_p

import torch
import torch.nn.functional as F

from batchllm.models.linear import Product, pack_torch, pack_torch_int8
from batchllm.native.kernels import ALL_STRIPS, NO_STRIPS, NativeKernels, whole_strips
from batchllm.native.pages import Slabs


class _PackedLinear(ctypes.Structure):
    """`PackedLinear` of native/src/linear.h."""

    _fields_ = [
        *[(name, c_int64) for name in ("inputs", "outputs", "gated")],
        *[(name, c_void_p) for name in ("panels", "scales", "starts", "bias")],
    ]


class NativeProducts:
    """Packs weights for the kernels, or for torch where that is faster.

    Which is where `tiles` says that only torch uses the processor's (not in float32), and on
    processors that the kernels were compiled for without knowing them. torch's products of a row
    can depend on how many others there are; `always` leaves them out.
    """

    def __init__(self, kernels: NativeKernels, *, tiles: bool, always: bool = False) -> None:
        self._kernels = kernels
        known = always or kernels.target != "portable"
        tiles = tiles and not always
        self._own = {torch.bfloat16: known and not tiles, torch.float32: known}
        self._int8 = not tiles
        self._slabs = Slabs()

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Pack`."""
        is_bfloat16 = weight.dtype == torch.bfloat16
        if not self._own[weight.dtype] or (is_bfloat16 and weight.shape[1] % 2):
            return pack_torch(weight, bias)
        return self._plain(weight, bias)

    def pack_int8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Pack`."""
        if not self._int8 or weight.shape[1] % 4:
            return pack_torch_int8(weight, bias)
        return self._rounded(weight, bias)

    def pack_gated(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantization: str | None
    ) -> Product | None:
        """See `Operations.pack_gated`."""
        width, (outputs, inputs) = self._kernels.gated_width, weight.shape
        value_bytes = {None: weight.dtype.itemsize, "int8": 1}.get(quantization)
        own = self._int8 if quantization == "int8" else weight.dtype == torch.bfloat16
        if not width or not own or value_bytes is None or outputs % (2 * width):
            return None
        if inputs * value_bytes % self._kernels.gated_row_bytes:
            return None
        make = self._rounded if quantization == "int8" else self._plain
        return make(weight, bias, gated=True)

    def _plain(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, gated: bool = False
    ) -> Product:
        kernels, is_bfloat16 = self._kernels, weight.dtype == torch.bfloat16
        packed = _Packed(kernels, self._slabs, weight, bias, is_int8=False, gated=gated)
        widens = is_bfloat16 and kernels.widened_bytes > 0  # to float32
        return NativeProduct(kernels, packed, is_int8=False, scratch_bytes=4 if widens else 0)

    def _rounded(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, gated: bool = False
    ) -> Product:
        kernels = self._kernels
        packed = _Packed(kernels, self._slabs, weight, bias, is_int8=True, gated=gated)
        return NativeProduct(kernels, packed, is_int8=True, scratch_bytes=kernels.rounded_bytes)


class NativeProduct:
    """A product by the compiled kernels; `scratch_bytes` of memory for each value that goes in."""

    def __init__(
        self, kernels: NativeKernels, packed: "_Packed", *, is_int8: bool, scratch_bytes: int
    ) -> None:
        self._kernels = kernels
        self.packed = packed
        self.is_int8 = is_int8
        self.scratch_bytes = scratch_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, inputs] to [rows, outputs], in the dtype of what goes in."""
        return self._run(x, x.shape[0], NO_STRIPS)

    def in_strips(self, x: torch.Tensor, rows: int) -> torch.Tensor | None:
        """See `StripsProduct`."""
        is_bfloat16 = x.dtype == torch.bfloat16
        if not self._kernels.takes_strips(is_bfloat16, self.is_int8, self.packed.pointer):
            return None
        assert x.shape[0] == whole_strips(rows), (x.shape, rows)
        return self._run(x, rows, ALL_STRIPS)

    def _run(self, x: torch.Tensor, rows: int, strips: int) -> torch.Tensor:
        kernels, packed = self._kernels, self.packed
        is_bfloat16, scratch, row_scales = self._memory(x)
        out = x.new_empty(x.shape[0], packed.outputs)
        pointers = [packed.pointer, x.data_ptr(), scratch.data_ptr()]
        if self.is_int8:
            pointers += [row_scales.data_ptr(), out.data_ptr()]
            kernels.linear_int8(is_bfloat16, rows, *pointers, strips)
        else:
            kernels.linear(is_bfloat16, rows, *pointers, out.data_ptr(), strips)
        return out

    def argmax(self, x: torch.Tensor) -> torch.Tensor | None:
        """See `RankingProduct`."""
        is_bfloat16, scratch, row_scales = self._memory(x)
        out = torch.empty(x.shape[0], dtype=torch.int32)
        pointers = (self.packed.pointer, x.data_ptr(), scratch.data_ptr(), row_scales.data_ptr())
        done = self._kernels.linear_argmax(
            is_bfloat16, self.is_int8, x.shape[0], *pointers, out.data_ptr()
        )
        return out if done else None

    def _memory(self, x: torch.Tensor) -> tuple[bool, torch.Tensor, torch.Tensor]:
        """Whether x is bfloat16, and memory for what it is multiplied as and its rows' scales."""
        assert x.is_contiguous() and x.shape[1] == self.packed.inputs, (x.shape, self.packed.inputs)
        scratch = torch.empty(
            whole_strips(x.shape[0]) * x.shape[1] * self.scratch_bytes, dtype=torch.uint8
        )
        row_scales = torch.empty(x.shape[0] if self.is_int8 else 0)
        return x.dtype == torch.bfloat16, scratch, row_scales


class _Packed:
    """A weight's panels, and what `PackedLinear` points to, kept alive."""

    def __init__(
        self,
        kernels: NativeKernels,
        slabs: Slabs,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        is_int8: bool,
        gated: bool,
    ) -> None:
        rows, self.inputs = weight.shape
        self.outputs = rows // 2 if gated else rows
        whole = -(-rows // kernels.panel_width) * kernels.panel_width
        value_bytes = 1 if is_int8 else weight.element_size()
        scales = torch.empty(whole) if is_int8 else None
        starts = torch.empty(whole, dtype=torch.int32) if is_int8 else None
        if bias is not None:
            bias = F.pad(_in_turn(bias, kernels.gated_width) if gated else bias, (0, whole - rows))
            bias = bias.float()
        panels = slabs.take(whole * self.inputs * value_bytes)
        self._tensors = (panels, scales, starts, bias)
        self._struct = _PackedLinear(
            self.inputs,
            rows,
            gated,
            *[None if tensor is None else tensor.data_ptr() for tensor in self._tensors],
        )
        self.pointer = ctypes.addressof(self._struct)
        self.gated = gated
        weight = weight.contiguous()
        kernels.pack(weight.dtype == torch.bfloat16, self.pointer, weight.data_ptr())


def _in_turn(gates_and_ups: torch.Tensor, width: int) -> torch.Tensor:
    """A bias as gated panels have it: in turn `width` of the first half and of the second."""
    return gates_and_ups.view(2, -1, width).transpose(0, 1).reshape(-1)
