"""One Parquet file: its footer, its row groups in small batches, and what is wrong with it.

Every failure to read becomes an InputError that names the file and the rows, on one line.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchllm.errors import InputError
from batchllm.io.durable import one_line_reason
from batchllm.io.rows import RowRange
from batchllm.io.sources import PARQUET_MAGIC

RUN_RECORD_KEY = b"batchllm"  # our entry in a file's key-value metadata

# What damaged or vanished files make Arrow raise.
READ_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError)

# Column streams are read in pieces of this size. Unbuffered, Arrow reads whole column chunks;
# with pre_buffer it reads the whole row group and keeps it.
_BUFFER_BYTES = 256 * 1024
_MAX_BATCH_ROWS = 2048
_TARGET_BATCH_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Footer:
    """What a file says about itself.

    `schema` has the file's key-value metadata but for `run_record`, which is our entry in it (None
    in a file that is not an output of ours). `group_rows` are the rows of each row group.
    """

    schema: pa.Schema
    group_rows: tuple[int, ...]
    num_bytes: int
    run_record: bytes | None


class ParquetReader:
    """An open Parquet file whose row groups are read in batches, a row group at a time.

    Raises:
        InputError: the file is missing, unreadable, empty, not Parquet, or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._source = pa.OSFile(str(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {one_line_reason(error)}") from error
        try:
            self._file = pq.ParquetFile(
                self._source,
                pre_buffer=False,
                buffer_size=_BUFFER_BYTES,
                page_checksum_verification=True,
            )
            self.footer = self._read_footer()
        except READ_ERRORS as error:
            self._source.close()
            raise _unreadable(path, error) from error

    def batches(
        self, group: int, first_row: int, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield one row group in batches; memory is bounded by a batch, not by the row group.

        `first_row` is the row group's place in the whole data set, for messages. Of `columns`,
        those that the file has are read; None reads all.

        Raises:
            InputError: a page cannot be read.
        """
        names = self.footer.schema.names
        read = names if columns is None else [name for name in names if name in set(columns)]
        at, end = first_row, first_row + self.footer.group_rows[group]
        try:
            # A row first: where columns' metadata is damaged, a read says so, and a look kills.
            next(self._file.iter_batches(1, [group], read), None)
            batches = self._file.iter_batches(self._batch_rows(group, read), [group], read)
        except READ_ERRORS as error:
            raise damaged(self.path, RowRange(at, end), one_line_reason(error)) from error
        while at < end:
            try:
                batch = next(batches)
            except StopIteration:
                raise damaged(self.path, RowRange(at, end), "the row group ends early") from None
            except READ_ERRORS as error:
                rows = RowRange(at, end)
                raise damaged(self.path, rows, one_line_reason(error)) from error
            yield batch
            at += batch.num_rows

    def close(self) -> None:
        self._source.close()

    def _batch_rows(self, group: int, names: Sequence[str]) -> int:
        """How many rows are a batch; only columns that have been read from are looked at."""
        metadata = self._file.metadata.row_group(group)
        paths = [self._file.schema.column(i).path for i in range(metadata.num_columns)]
        num_bytes = sum(
            int(metadata.column(i).total_uncompressed_size)
            for i, path in enumerate(paths)
            if any(f"{path}.".startswith(f"{name}.") for name in names)
        )
        # Dictionary-encoded text decodes to far more than its encoded size, hence also a row limit.
        row_bytes = max(1, num_bytes // max(1, int(metadata.num_rows)))
        return max(1, min(_MAX_BATCH_ROWS, _TARGET_BATCH_BYTES // row_bytes))

    def _read_footer(self) -> Footer:
        schema, metadata = self._file.schema_arrow, self._file.metadata
        _ = schema.names  # a damaged name must fail to decode here, not later
        # Arrow's schema leaves out what was added to the file's metadata after it was opened.
        entries = {**(schema.metadata or {}), **(metadata.metadata or {})}
        entries.pop(b"ARROW:schema", None)
        record = entries.pop(RUN_RECORD_KEY, None)
        groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        schema = schema.with_metadata(entries or None)
        return Footer(schema, groups, self._source.size(), record)


def damaged(path: Path, rows: RowRange, reason: str) -> InputError:
    """The error for rows of a file (in whole-dataset numbers) that cannot be decoded."""
    return InputError(f"{path}: {rows} cannot be read: {reason}")


def _unreadable(path: Path, error: BaseException) -> InputError:
    """Say what is wrong with a file whose footer cannot be read."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            head = file.read(4)
            file.seek(max(0, size - 4))
            tail = file.read(4)
    except OSError as reason:
        return InputError(f"{path}: cannot be read: {one_line_reason(reason)}")
    if size == 0:
        return InputError(f"{path}: the file is empty (0 bytes)")
    if head != PARQUET_MAGIC:
        return InputError(f"{path}: not a Parquet file")
    if tail != PARQUET_MAGIC or size < 12:
        return InputError(f"{path}: the Parquet file is truncated: it has no footer")
    return InputError(f"{path}: the Parquet file is damaged: {one_line_reason(error)}")
