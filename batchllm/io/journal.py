"""Answers as they come, so that a job that dies within a window goes on from there.

A window may take hours, and its answers become a file only when it ends. Until then they are
appended to a journal: records of their sizes, a checksum and an Arrow record batch of answers. A
record that a crash cut short is the last one, and is dropped; so is all from the first that was
damaged. Records reach the kernel at once, so that a killed process loses none of them, and the disk
every few seconds, so that a power cut loses little.
"""

import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from batchllm.io.durable import AppendFile

_SYNC_SECONDS = 10.0
_HEAD = struct.Struct("<QII")  # bytes of the payload, rows in it, its CRC-32


class Journal:
    """The appending side; what an earlier process left is read first, by `read_journal`.

    Raises:
        OSError: from any method; a record that could not be written whole is taken back.
    """

    def __init__(self, path: Path, num_valid_bytes: int) -> None:
        self._file = AppendFile(path, num_valid_bytes)
        self._synced = time.monotonic()

    def append(self, batch: pa.RecordBatch) -> None:
        """Keep some answers."""
        payload = batch.serialize()
        head = _HEAD.pack(payload.size, batch.num_rows, zlib.crc32(payload))
        is_due = time.monotonic() - self._synced >= _SYNC_SECONDS
        self._file.append(head + payload.to_pybytes(), sync=is_due)
        if is_due:
            self._synced = time.monotonic()

    def clear(self) -> None:
        """Forget everything: it is safe elsewhere."""
        self._file.clear()

    def close(self) -> None:
        self._file.close()


def read_journal(path: Path, schema: pa.Schema) -> tuple[list[pa.RecordBatch], int]:
    """The whole records of a journal, and their bytes; none where there is no journal.

    Raises:
        OSError: the file cannot be read.
    """
    batches, num_bytes = [], 0
    for record in _whole_records(path):
        try:
            batches.append(pa.ipc.read_record_batch(pa.py_buffer(record.payload), schema))
        except (pa.ArrowException, OSError):
            break
        num_bytes = record.end
    return batches, num_bytes


def journaled_rows(path: Path) -> int:
    """How many rows' answers a journal holds.

    Raises:
        OSError: the file cannot be read.
    """
    return sum(record.num_rows for record in _whole_records(path))


@dataclass(frozen=True, slots=True)
class _Record:
    """`end` is where it ends in the file."""

    payload: bytes
    num_rows: int
    end: int


def _whole_records(path: Path) -> Iterator[_Record]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    at = 0
    while at + _HEAD.size <= len(content):
        size, num_rows, checksum = _HEAD.unpack_from(content, at)
        at += _HEAD.size
        payload = content[at : at + size]
        at += size
        if len(payload) < size or zlib.crc32(payload) != checksum:
            return
        yield _Record(payload, num_rows, at)
