"""Rows dealt out to buckets and read back a bucket at a time, on disk where memory ends."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchllm.errors import OutputError
from batchllm.io.durable import one_line_reason
from batchllm.io.rows import Rows

_BUDGET_BYTES = 128 * 1024 * 1024
_OPTIONS = pa.ipc.IpcWriteOptions(compression="zstd")


class Spool:
    """An external shuffle.

    Idea: rows gather in memory; when they pass the budget they are sorted by bucket and written as
    one run, a file with one Arrow stream for each bucket that has rows. A bucket is read by taking
    its stream from every run. So neither memory nor the number of open files grows with the
    number of buckets, and what fits the budget never touches the disk.

    Args:
        directory: where runs go; made when there is one, deleted by `close`.
        schema: every row's columns.
        num_buckets: buckets are numbered from 0.
        budget_bytes: how much is held in memory before it is written.

    Raises:
        OutputError: from any method, a run cannot be written or read.
    """

    def __init__(
        self,
        directory: Path,
        schema: pa.Schema,
        num_buckets: int,
        *,
        budget_bytes: int | None = None,
    ) -> None:
        self.counts: NDArray[np.int64] = np.zeros(num_buckets, dtype=np.int64)
        self._directory = directory
        self._schema = pa.schema([pa.field("row", pa.int64()), *schema])
        self._budget = _BUDGET_BYTES if budget_bytes is None else budget_bytes
        self._held: list[Rows] = []
        self._held_buckets: list[NDArray[np.int64]] = []
        self._held_bytes = 0
        self._runs: list[NDArray[np.int64]] = []  # where each bucket's stream starts; -1: none
        self._sorted: tuple[Rows, NDArray[np.int64]] | None = None  # what stayed in memory

    def add(self, rows: Rows, buckets: NDArray[np.int64]) -> None:
        """Put each row into its bucket, [num_rows]."""
        assert self._sorted is None, "rows added after reading began"
        self.counts += np.bincount(buckets, minlength=len(self.counts))
        self._held.append(rows)
        self._held_buckets.append(buckets)
        self._held_bytes += rows.table.nbytes
        if self._held_bytes > self._budget:
            self._write_run()

    def read(self, bucket: int) -> Rows:
        """A bucket's rows, ascending by number."""
        if self._sorted is None:
            self._sorted = self._sort()
        rows, offsets = self._sorted
        begin, end = offsets[bucket : bucket + 2].tolist()
        in_memory = Rows(rows.index[begin:end], rows.table.slice(begin, end - begin))
        with self._io_errors():
            pieces = [self._read_run(number, bucket) for number in range(len(self._runs))]
        return Rows.concat(
            [*(piece for piece in pieces if piece is not None), in_memory]
        ).by_number()

    def close(self) -> None:
        """Give up memory and disk."""
        self._held, self._held_buckets, self._sorted, self._runs = [], [], None, []
        shutil.rmtree(self._directory, ignore_errors=True)

    def _sort(self) -> tuple[Rows, NDArray[np.int64]]:
        """What is held, sorted by bucket, and where each bucket begins; nothing is held then."""
        offsets = np.zeros(len(self.counts) + 1, dtype=np.int64)
        if not self._held:
            empty = self._schema.empty_table().remove_column(0)
            return Rows(np.zeros(0, dtype=np.int64), empty), offsets
        rows, buckets = Rows.concat(self._held), np.concatenate(self._held_buckets)
        self._held, self._held_buckets, self._held_bytes = [], [], 0
        np.cumsum(np.bincount(buckets, minlength=len(self.counts)), out=offsets[1:])
        return rows.take(np.argsort(buckets, kind="stable")), offsets

    def _write_run(self) -> None:
        rows, offsets = self._sort()
        starts = np.full(len(self.counts), -1, dtype=np.int64)
        with self._io_errors():
            self._directory.mkdir(parents=True, exist_ok=True)
            with self._run_path(len(self._runs)).open("wb") as file:
                for bucket in np.flatnonzero(np.diff(offsets)).tolist():
                    starts[bucket] = file.tell()
                    span = slice(int(offsets[bucket]), int(offsets[bucket + 1]))
                    columns = [
                        pa.chunked_array([rows.index[span]]),
                        *rows.table.slice(span.start, span.stop - span.start).columns,
                    ]
                    with pa.ipc.new_stream(file, self._schema, options=_OPTIONS) as stream:
                        stream.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._runs.append(starts)

    def _read_run(self, number: int, bucket: int) -> Rows | None:
        start = int(self._runs[number][bucket])
        if start < 0:
            return None
        with self._run_path(number).open("rb") as file:
            file.seek(start)
            table = pa.ipc.open_stream(file).read_all()
        index = table.column(0).to_numpy()
        return Rows(index, table.remove_column(0))

    def _run_path(self, number: int) -> Path:
        return self._directory / f"run-{number:06d}"

    @contextmanager
    def _io_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            reason = one_line_reason(error)
            raise OutputError(f"{self._directory}: cannot hold rows: {reason}") from error
