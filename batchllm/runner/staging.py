"""A step's index arrays on their way to the device: packed, pinned, one copy.

A copy of its own for every small array would cost more time than the arrays are worth, and one from
memory that is not pinned would make the host wait for all that the device has still to do. So the
arrays of a step go one behind the other into pinned memory, which exists twice: while the device
copies (or has yet to) from one half, the next step is packed into the other.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from batchllm.runner.device import Device

Put = Callable[[NDArray[Any]], torch.Tensor]
"""An array on its way to the device: a tensor there, which holds it once the step's are sent."""

_ALIGNMENT = 256  # bytes: no kernel wants more
_KINDS = {
    np.dtype(name): getattr(torch, name)
    for name in ("bool", "uint8", "int32", "int64", "float32", "float64")
}


def put_now(device: torch.device) -> Put:
    """For who cannot wait for a step to be sent: each array goes over by itself, at once."""
    return lambda array: torch.from_numpy(array).to(device)


class Stager:
    """Packs a step's arrays tightly, wherever they then lie.

    A step with more than there is room for sends what it has, and goes on in memory twice as large.
    """

    def __init__(self, device: Device, num_bytes: int = 1 << 20) -> None:
        self._device = device
        self._mirror = Mirror(device, num_bytes)
        self._end = 0

    def put(self, array: NDArray[Any]) -> torch.Tensor:
        """Take an array along; see `Put`. It may be changed at once, the tensor lasts a step."""
        if self._end + array.nbytes > self._mirror.num_bytes:
            self.send()
            more = max(array.nbytes, self._mirror.num_bytes)
            self._mirror = Mirror(self._device, 2 * more)
        begin = self._end
        self._mirror.write(begin, array)
        self._end = _aligned(begin + array.nbytes)
        return self._mirror.view(begin, array.shape, array.dtype)

    def send(self) -> None:
        """Let the device copy what was put, behind all that it was given before."""
        if self._end:
            self._mirror.send(0, min(self._end, self._mirror.num_bytes))
            self._end = 0


class FixedStager:
    """Arrays that are found in the same place every step, as a recorded step must find them."""

    def __init__(self, device: Device, num_bytes: int = 1 << 20) -> None:
        self._device = device
        self._num_bytes = num_bytes
        self._pages: list[_Page] = []

    def reserve(self, size: int, dtype: type[np.generic]) -> "Place":
        """A place for up to `size` elements.

        What lies between the first and the last place that a step fills is copied, so places that
        are filled together should be reserved together, the one that is fullest at its end last.
        """
        num_bytes = size * np.dtype(dtype).itemsize
        if not self._pages or not self._pages[-1].has_room(num_bytes):
            mirror = Mirror(self._device, max(num_bytes, self._num_bytes))
            self._pages.append(_Page(mirror))
        return self._pages[-1].reserve(size, np.dtype(dtype))

    def send(self) -> None:
        """Let the device copy what was filled; what was not is undefined then."""
        for page in self._pages:
            page.send()


class Place:
    """Where an array always lies: `tensor`, on the device, [size]."""

    def __init__(self, page: "_Page", begin: int, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._page = page
        self._begin = begin

    def fill(self, array: NDArray[Any]) -> None:
        """What its first elements shall be in the next step."""
        assert array.size <= len(self.tensor), (array.size, len(self.tensor))
        assert _KINDS[array.dtype] == self.tensor.dtype, (array.dtype, self.tensor.dtype)
        self._page.write(self._begin, array)


class _Page:
    """Places in one mirror, and what of it was filled: bytes [begin, end)."""

    def __init__(self, mirror: "Mirror") -> None:
        self._mirror = mirror
        self._reserved = 0
        self._begin, self._end = mirror.num_bytes, 0

    def has_room(self, num_bytes: int) -> bool:
        return self._reserved + num_bytes <= self._mirror.num_bytes

    def reserve(self, size: int, dtype: np.dtype[Any]) -> Place:
        begin = self._reserved
        self._reserved = _aligned(begin + size * dtype.itemsize)
        return Place(self, begin, self._mirror.view(begin, (size,), dtype))

    def write(self, begin: int, array: NDArray[Any]) -> None:
        self._mirror.write(begin, array)
        self._begin, self._end = min(self._begin, begin), max(self._end, begin + array.nbytes)

    def send(self) -> None:
        if self._begin < self._end:
            self._mirror.send(self._begin, self._end)
        self._begin, self._end = self._mirror.num_bytes, 0


class Mirror:
    """Memory of the device, and the host's pinned counterpart twice."""

    def __init__(self, device: Device, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device.torch_device)
        self._hosts = [device.pinned(num_bytes) for _ in range(2)]
        self._copied = [device.event() for _ in range(2)]
        self._turn = 0

    def write(self, begin: int, array: NDArray[Any]) -> None:
        """Copy an array to the host's side."""
        room = self._hosts[self._turn].numpy()[begin : begin + array.nbytes]
        room.view(array.dtype).reshape(array.shape)[...] = array

    def view(self, begin: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
        """An array's place on the device's side."""
        end = begin + int(np.prod(shape)) * dtype.itemsize
        return self._bytes[begin:end].view(_KINDS[dtype]).view(shape)

    def send(self, begin: int, end: int) -> None:
        """Let the device copy bytes [begin, end), and wait for the copy before this one's."""
        host = self._hosts[self._turn]
        self._bytes[begin:end].copy_(host[begin:end], non_blocking=True)
        self._copied[self._turn].record()
        self._turn = 1 - self._turn
        self._copied[self._turn].synchronize()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
