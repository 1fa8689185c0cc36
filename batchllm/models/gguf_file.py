"""The GGUF container: a header of key-values and tensor places, then the tensors' bytes.

The whole header is parsed in one pass over a memory map (about a tenth of a second for a vocabulary
of 50,000, where the gguf package's reader makes an array object of every string and needs seconds).
Every read is checked against the file's end, and so is every tensor's extent, so that a truncated
file is told when it is opened and not in the middle of a run.
"""

import hashlib
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchllm.errors import ModelError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {  # value type → struct code, also a numpy dtype
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_MAX_DIMS = 4


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor's place in the file.

    `shape` is outermost first, as Hugging Face names it (the file stores the reverse). `type_id` is
    the ggml type; `offset` and `num_bytes` are in bytes from the file's start.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class GGUFFile:
    """A GGUF file, opened as a read-only memory map.

    `metadata` maps keys to str, int, float, bool, list of str, or numpy arrays; `tensors` keeps the
    file's order.

    Raises:
        ModelError: not a GGUF file, truncated, or of a version or tensor type not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise ModelError(f"{path}: the file is empty") from None
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
        reader = _Reader(self._map)
        try:
            self.metadata, self.tensors, header_bytes = _read_header(reader)
        except _MalformedError as error:
            raise ModelError(f"{path}: {error}") from None
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError):
            raise ModelError(
                f"{path}: the GGUF header is truncated or corrupt near byte {reader.position:,}"
            ) from None
        self.header_sha256 = hashlib.sha256(self._map[:header_bytes]).hexdigest()

    @property
    def num_bytes(self) -> int:
        return len(self._map)

    def rows(self, tensor: GGUFTensor) -> NDArray[np.uint8]:
        """A tensor's stored bytes, uint8 [rows, bytes per row], a read-only view of the map."""
        data = np.frombuffer(self._map, np.uint8, tensor.num_bytes, tensor.offset)
        return data.reshape(math.prod(tensor.shape[:-1]), -1)


class _MalformedError(Exception):
    """What is wrong with a header, without the file's name."""


class _Reader:
    """A cursor over the map; a read past the end raises struct.error."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def scalar(self, code: str) -> Any:  # noqa: ANN401
        (value,) = struct.unpack_from(code, self.data, self.position)
        self.position += struct.calcsize(code)
        return value

    def bytes_(self) -> bytes:
        size = self.scalar("<Q")
        end = self.position + size
        if end > len(self.data):
            raise struct.error
        value = self.data[self.position : end]
        self.position = end
        return value

    def string(self) -> str:
        return self.bytes_().decode()

    def value(self, kind: int) -> Any:  # noqa: ANN401
        if kind == _STRING:
            # A value may hold any bytes; a damaged one must not cost the whole file.
            return self.bytes_().decode(errors="replace")
        if kind == _ARRAY:
            return self.array(self.scalar("<I"), self.scalar("<Q"))
        if kind not in _SCALARS:
            raise _MalformedError(f"the GGUF header has a value of unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self, kind: int, count: int) -> list[Any] | NDArray[Any]:
        if kind == _STRING:
            return self.strings(count)
        if kind not in _SCALARS:
            raise _MalformedError(f"the GGUF header has an array of unsupported type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        if self.position + count * dtype.itemsize > len(self.data):
            raise struct.error
        values = np.frombuffer(self.data, dtype, count, self.position)
        self.position += count * dtype.itemsize
        return values

    def strings(self, count: int) -> list[str]:
        # The vocabulary's hot loop: locals instead of one call and one attribute a string.
        data, position, unpack = self.data, self.position, struct.Struct("<Q").unpack_from
        values: list[str] = []
        append = values.append
        for _ in range(count):
            (size,) = unpack(data, position)
            position += 8
            if position + size > len(data):
                raise struct.error
            append(data[position : position + size].decode(errors="replace"))
            position += size
        self.position = position
        return values


def _read_header(reader: _Reader) -> tuple[dict[str, Any], dict[str, GGUFTensor], int]:
    if reader.data[:4] != _MAGIC:
        raise _MalformedError("this is not a GGUF file")
    reader.position = 4
    version = reader.scalar("<I")
    if version not in (2, 3):
        # A big-endian file shows its version in the upper half.
        told = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise _MalformedError(f"GGUF {told} is not supported; supported: little-endian 2 and 3")
    num_tensors, num_values = reader.scalar("<Q"), reader.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar("<I"))
    parts = metadata.get("split.count", 1)
    if not isinstance(parts, int) or parts not in (0, 1):
        raise _MalformedError(
            f"this is one of {parts} parts of a split GGUF; "
            "merge them into one file first (llama-gguf-split --merge)"
        )
    places = [_read_place(reader) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise _MalformedError(f"the GGUF header's alignment is {alignment!r}")
    start = -(-reader.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for place in places:
        tensor = _locate(place, start)
        if tensor.offset + tensor.num_bytes > len(reader.data):
            raise _MalformedError(
                f"the file is truncated: it has {len(reader.data):,} bytes, but tensor "
                f"{tensor.name} ends at byte {tensor.offset + tensor.num_bytes:,}"
            )
        if tensor.name in tensors:
            raise _MalformedError(f"tensor {tensor.name} occurs twice")
        tensors[tensor.name] = tensor
    return metadata, tensors, reader.position


@dataclass(frozen=True, slots=True)
class _Place:
    name: str
    dims: tuple[int, ...]
    type_id: int
    offset: int


def _read_place(reader: _Reader) -> _Place:
    name = reader.string()
    num_dims = reader.scalar("<I")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise _MalformedError(f"tensor {name} has {num_dims} dimensions")
    dims = tuple(reader.scalar("<Q") for _ in range(num_dims))
    if 0 in dims:
        raise _MalformedError(f"tensor {name} is empty")
    return _Place(name, dims, reader.scalar("<I"), reader.scalar("<Q"))


def _locate(place: _Place, start: int) -> GGUFTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(place.type_id)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise _MalformedError(
            f"tensor {place.name} has the unknown ggml type {place.type_id}"
        ) from None
    if place.dims[0] % block:
        raise _MalformedError(
            f"tensor {place.name} has rows of {place.dims[0]} values, not a multiple of "
            f"{kind.name}'s block of {block}"
        )
    return GGUFTensor(
        name=place.name,
        shape=place.dims[::-1],
        type_id=place.type_id,
        type_name=kind.name,
        offset=start + place.offset,
        num_bytes=math.prod(place.dims) // block * block_bytes,
    )
