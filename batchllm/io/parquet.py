"""Parquet in: rows read forward once, in batches, with memory bounded by a batch.

One row group is open at a time and gives small batches. So a row group of any size is decoded
once, and never held whole. Arrow's own data set scanner reads ahead by row groups and holds them,
which is why it is not used.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchllm.errors import InputError
from batchllm.io.durable import one_line_reason
from batchllm.io.row_groups import READ_ERRORS, ParquetReader, damaged
from batchllm.io.rows import RowRange, Rows
from batchllm.io.schema import SchemaUnifier, conform
from batchllm.io.sources import SourceFile, find_files


@dataclass(frozen=True, slots=True)
class _Part:
    """One file and where its row groups lie: group i holds rows `bounds[i]` to `bounds[i + 1]`.

    `bounds` are whole-dataset row numbers, [num_row_groups + 1].
    """

    source: SourceFile
    bounds: tuple[int, ...]


class ParquetInput:
    """A Parquet file, directory or glob as one long table, in the order of its sorted file names.

    Attributes:
        files: the files, in row order.
        schema: every window's schema: the files' columns, then hive columns; the first file's
            metadata. A column that a file has itself comes before a hive key of the same name.
        num_rows: rows in all files.
        size_bytes: bytes of all files on disk.

    Raises:
        InputError: nothing is there, or a file is empty, not Parquet, truncated, unreadable, or
            has a schema that does not fit the others'.
    """

    def __init__(self, path: str | Path) -> None:
        sources = find_files(path)
        unifier = SchemaUnifier()
        self._parts: list[_Part] = []
        self.num_rows: int = 0
        self.size_bytes: int = 0
        for source in sources:
            with closing(ParquetReader(source.path)) as reader:
                footer = reader.footer
            unifier.add(str(source.path), footer.schema)
            part = _Part(source, tuple(accumulate(footer.group_rows, initial=self.num_rows)))
            self._parts.append(part)
            self.num_rows = part.bounds[-1]
            self.size_bytes += footer.num_bytes
        unifier.add_hive([source.hive_values for source in sources])
        self.files: tuple[Path, ...] = tuple(source.path for source in sources)
        self.schema: pa.Schema = unifier.schema()

    def read(
        self, wanted: NDArray[np.bool_] | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[Rows]:
        """Yield rows in their order, a batch at a time; row groups with none wanted are skipped.

        Args:
            wanted: which rows, [n] for the first n rows of the input; None for all.
            columns: which columns, in this order; None for all.

        Raises:
            InputError: a file cannot be read, or changed since it was opened.
        """
        schema = self.schema
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns], metadata=schema.metadata)
        for part in self._parts:
            if _any(wanted, part.bounds[0], part.bounds[-1]):
                with closing(ParquetReader(part.source.path)) as reader:
                    yield from _read_part(part, reader, wanted, schema)

    def content_hash(self) -> str:
        """Sha256 (hex) over each file's name below INPUT and its bytes, streamed.

        A file's own name does not count where it is the only one.

        Raises:
            InputError: a file cannot be read.
        """
        whole = hashlib.sha256()
        for part in self._parts:
            path = part.source.path
            try:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").digest()
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {one_line_reason(error)}") from error
            folder, _, own = part.source.name.rpartition("/")
            shown = f"{folder}/{own if len(self._parts) > 1 else ''}"
            name = shown.encode("utf-8", "surrogateescape")
            whole.update(len(name).to_bytes(8, "big") + name + digest)
        return whole.hexdigest()


def _read_part(
    part: _Part, reader: ParquetReader, wanted: NDArray[np.bool_] | None, schema: pa.Schema
) -> Iterator[Rows]:
    if reader.footer.group_rows != tuple(b - a for a, b in pairwise(part.bounds)):
        raise InputError(f"{part.source.path}: the file changed while it was being read")
    for group, (start, end) in enumerate(pairwise(part.bounds)):
        if not _any(wanted, start, end):
            continue
        at = start
        for batch in reader.batches(group, start, schema.names):
            rows = _rows(batch, schema, part.source, at)
            at += batch.num_rows
            if wanted is not None:
                rows = rows.where(_wanted(wanted, rows.index))
            if len(rows.index):
                yield rows


def _rows(batch: pa.RecordBatch, schema: pa.Schema, source: SourceFile, at: int) -> Rows:
    try:
        batch = conform(batch, schema, source.hive_values)
    except READ_ERRORS as error:
        rows = RowRange(at, at + batch.num_rows)
        raise damaged(source.path, rows, one_line_reason(error)) from error
    return Rows(np.arange(at, at + batch.num_rows), pa.Table.from_batches([batch], schema))


def _wanted(wanted: NDArray[np.bool_], index: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.pad(wanted[index[0] : index[-1] + 1], (0, len(index)))[: len(index)]


def _any(wanted: NDArray[np.bool_] | None, start: int, end: int) -> bool:
    return start < end if wanted is None else bool(wanted[start:end].any())
