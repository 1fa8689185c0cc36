"""Memory in large pages, in which what is read whole, step after step, is found faster."""

import contextlib
import math
import mmap

import torch

_SLAB_BYTES = 64 << 20
_LINE = 64  # bytes


def zero_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zero pages of the operating system, which cost nothing before they are written."""
    count = math.prod(shape)
    memory = mmap.mmap(-1, count * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # first use of a small page costs as much as filling it
        with contextlib.suppress(OSError):  # a kernel built without
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


class Slabs:
    """Many tensors side by side in large pages, each at the beginning of a line of the cache.

    A large page is more than most weights need; memory is given back when all are gone. Where the
    system gives no slab, there are small pages.
    """

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> torch.Tensor:
        """So many bytes, not set to anything, uint8 [size]."""
        if self._used + size > self._slab.numel():
            try:
                self._slab = zero_pages((max(size, _SLAB_BYTES),), torch.uint8)
            except OSError:
                return torch.empty(size, dtype=torch.uint8)
            self._used = 0
        place = self._slab[self._used : self._used + size]
        self._used += -(-size // _LINE) * _LINE
        return place
