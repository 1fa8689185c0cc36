"""Parquet in: windows of consecutive rows, read forward once, with memory bounded by the window.

One row group is open at a time and gives small batches; what a batch holds beyond a window stays
for the next one. So a row group of any size is decoded once, and never held whole. Arrow's own
data set scanner reads ahead by row groups and holds them, which is why it is not used.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow as pa

from batchllm.errors import InputError
from batchllm.io.durable import one_line_reason
from batchllm.io.ranges import RowRange
from batchllm.io.row_groups import READ_ERRORS, ParquetReader, damaged
from batchllm.io.schema import SchemaUnifier, conform
from batchllm.io.sources import SourceFile, find_files


@dataclass(frozen=True, slots=True)
class Window:
    """The rows planned together: their place in the data set and their columns."""

    rows: RowRange
    table: pa.Table


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

    def windows(self, ranges: Iterable[RowRange]) -> Iterator[Window]:
        """Yield the rows of each range, reading forward; row groups between ranges are not read.

        Raises:
            InputError: a file cannot be read, or changed since it was opened.
            ValueError: the ranges are not ascending, overlap, or end beyond the last row.
        """
        last_end = 0
        with closing(_ForwardReader(self._parts, self.schema)) as reader:
            for rows in ranges:
                if rows.start < last_end or rows.end > self.num_rows:
                    raise ValueError(f"{rows} out of order, or beyond all {self.num_rows} rows")
                last_end = rows.end
                yield Window(rows, reader.read(rows))

    def content_hash(self) -> str:
        """Sha256 (hex) over each file's name below INPUT and its bytes, streamed.

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
            name = part.source.name.encode("utf-8", "surrogateescape")
            whole.update(len(name).to_bytes(8, "big") + name + digest)
        return whole.hexdigest()


class _ForwardReader:
    """Holds the one open file, its one open row group, and the batch read last.

    `_batch` covers rows `[_start, _end)`; the row group it is from ends before `_group_end`.
    """

    def __init__(self, parts: Sequence[_Part], schema: pa.Schema) -> None:
        self._parts = parts
        self._schema = schema
        self._part: _Part | None = None
        self._file: ParquetReader | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._start = self._end = self._group_end = 0

    def read(self, rows: RowRange) -> pa.Table:
        """Rows never go back: `rows` starts at or after the end of the last range read."""
        pieces = []
        at = rows.start
        while at < rows.end:
            if at >= self._group_end:
                self._open_group(at)
            while at >= self._end:
                self._batch = next(self._batches)
                self._start, self._end = self._end, self._end + self._batch.num_rows
            assert self._batch is not None and self._part is not None
            piece = self._batch.slice(at - self._start, rows.end - at)
            pieces.append(self._conform(piece, self._part.source, at))
            at += piece.num_rows
        return pa.Table.from_batches(pieces, schema=self._schema)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open_group(self, row: int) -> None:
        """Open the row group that holds `row`, at that row group's first row."""
        # Of files and row groups that start at one row, only the last can have rows.
        part = self._parts[bisect_right(self._parts, row, key=lambda p: p.bounds[0]) - 1]
        group = bisect_right(part.bounds, row) - 1
        self._batch = None  # a batch of the old row group must not be held while the next is read
        if self._file is None or part is not self._part:
            self.close()
            self._file = ParquetReader(part.source.path)
            self._part = part
            if self._file.footer.group_rows != tuple(b - a for a, b in pairwise(part.bounds)):
                raise InputError(f"{part.source.path}: the file changed while it was being read")
        self._start = self._end = part.bounds[group]
        self._group_end = part.bounds[group + 1]
        self._batches = self._file.batches(group, self._start)

    def _conform(self, piece: pa.RecordBatch, source: SourceFile, at: int) -> pa.RecordBatch:
        try:
            return conform(piece, self._schema, source.hive_values)
        except READ_ERRORS as error:
            rows = RowRange(at, at + piece.num_rows)
            raise damaged(source.path, rows, one_line_reason(error)) from error
