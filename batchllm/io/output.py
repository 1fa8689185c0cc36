"""The output of a job: answers written in any order, resumable after a crash at any point.

Answers of some rows are on disk in this order: their file under a temporary name, fsync, rename,
fsync of the directory, and only then its manifest line. So a file without a line may be anything
and is thrown away, and a line without its file cannot come about by a crash. When every row has an
answer, input and answers are joined in row order; the memory of that is bounded by a row group.
Answers that come before their file can be written are kept in a journal.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchllm.errors import InputError, OutputError
from batchllm.io.begin import (
    BegunOutput,
    begin,
    load_complete,
    numbered_schema,
    refuse_busy,
    stamp,
)
from batchllm.io.content import ContentHash
from batchllm.io.durable import OutputLock, atomic_write, one_line_reason
from batchllm.io.identity import plain
from batchllm.io.in_flight import InFlight, Suspects
from batchllm.io.join import RowSource, RowStream, join
from batchllm.io.layout import FinishedFile, OutputLayout
from batchllm.io.manifest import AnswersRecord, FileRecord, FinishedRecord, Job
from batchllm.io.parts import part_name, without_record, write_parquet
from batchllm.io.reopen import erase_other
from batchllm.io.rows import RowRange, Rows

_PART_ROWS = 1_000_000  # of a directory's parts


class OutputStore:
    """One job's output, new, resumed or already complete. Use `open`; not for two threads at once.

    Attributes:
        schema: the output's: the input's columns, then the answers'.
        answer_schema: the answers' columns.
        summary: the summary of a complete output, else None.
    """

    def __init__(
        self, layout: OutputLayout, schema: pa.Schema, answer_schema: pa.Schema, job: Job
    ) -> None:
        self.schema = schema
        self.answer_schema = answer_schema
        self.summary: dict[str, Any] | None = None
        self._layout = layout
        self._job = job
        self._begun: BegunOutput | None = None

    @staticmethod
    def refuse_busy(path: str | Path) -> None:
        """Make sure that no process is writing the output at `path` right now.

        `open` does so too; this is for before the work of finding out what job it is.

        Raises:
            OutputError: one is.
        """
        refuse_busy(OutputLayout.of(path))

    @classmethod
    def open(
        cls,
        path: str | Path,
        schema: pa.Schema,
        answer_schema: pa.Schema,
        identity: Mapping[str, Any],
        *,
        num_rows: int,
        overwrite: bool = False,
        retry: str | None = None,
    ) -> "OutputStore":
        """Start the output of a job of `num_rows` rows at `path`, or take it up where it stopped.

        A path that ends in `.parquet` or `.pq` is a file, any other a directory; missing parents
        are made. `identity` is nested plain data, everything that must be the same for the answers
        to belong together. A complete output is not locked and not written to.

        Args:
            path: where.
            schema: the input's columns.
            answer_schema: the columns that answers add.
            identity: what the job is.
            num_rows: rows of the job.
            overwrite: first delete an output of ours that is complete, or is another job's.
            retry: a column of answers; rows that have a value in it are to be answered again.

        Raises:
            OutputError: the output belongs to a different job, to another program or to a process
                that is writing it right now; or the place cannot be written.
        """
        layout = OutputLayout.of(path)
        schema = without_record(pa.schema([*schema, *answer_schema], metadata=schema.metadata))
        columns = {column.name: str(column.type) for column in schema}
        store = cls(layout, schema, answer_schema, Job(plain(identity), num_rows, columns))
        try:
            if overwrite:
                erase_other(layout, store._job)
            done = load_complete(layout, store._job)
            if done is None or (retry is not None and done.has_failed):
                begun = begin(layout, store._job, answer_schema, retry=retry)
                if isinstance(begun, BegunOutput):
                    store._begun = begun
                    return store
                done = begun
            store.summary = dict(done.summary)
            store._tidy_after_crash()
        except OSError as error:
            raise store._cannot_write(error) from error
        return store

    @property
    def is_complete(self) -> bool:
        return self.summary is not None

    @property
    def scratch(self) -> Path:
        """A directory for what memory cannot hold; whoever makes it deletes it."""
        return self._temporary("spool")

    @property
    def finished(self) -> NDArray[np.bool_]:
        """Which rows have their answer on disk, [num_rows]; those in the journal have not yet."""
        if self._begun is not None:
            return self._begun.finished
        return np.full(self._job.num_rows, self.is_complete, dtype=np.bool_)

    @property
    def journaled(self) -> Rows | None:
        """What an earlier process left in the journal, for `write_answers` to be given."""
        return None if self._begun is None else self._begun.journaled

    @property
    def suspects(self) -> Suspects:
        """What crashes of earlier processes tell, of rows that are not finished."""
        return self._unfinished().suspects

    def in_flight(self) -> InFlight:
        """What keeps the rows in flight for whoever comes after a crash; to be closed.

        Raises:
            OutputError: it cannot be made.
        """
        try:
            return InFlight(self._layout)
        except OSError as error:
            raise self._cannot_write(error) from error

    @property
    def counters(self) -> list[dict[str, Any]]:
        """The counters that came with the answers, in the order of writing."""
        return [] if self._begun is None else [dict(a.counters) for a in self._begun.answers]

    @property
    def num_failed(self) -> int:
        """Rows whose answer is an error, of those on disk."""
        return 0 if self._begun is None else sum(a.failed for a in self._begun.answers)

    def journal(self, rows: NDArray[np.int64], table: pa.Table) -> None:
        """Keep answers that are to come in a later `write_answers`, should that never be called.

        Args:
            rows: the rows' numbers, [num_rows of the table].
            table: their answers.

        Raises:
            OutputError: they cannot be written; the output is as it was before.
            ValueError: the output is complete or closed.
        """
        begun = self._unfinished()
        try:
            for batch in self._numbered(rows, table).combine_chunks().to_batches():
                begun.journal_is_empty = False
                begun.journal.append(batch)
        except (OSError, pa.ArrowException) as error:
            raise self._cannot_write(error) from error

    def write_answers(
        self, rows: NDArray[np.int64], table: pa.Table, counters: Mapping[str, Any]
    ) -> None:
        """Put the answers of some rows on disk and then on record; the journal is empty then.

        Args:
            rows: the rows' numbers, ascending, [num_rows of the table].
            table: their answers.
            counters: plain data to keep with them; `failed` is how many failed.

        Raises:
            OutputError: it cannot be written; the output is as it was before.
            ValueError: the table is not what was declared for these rows, or they are done already.
        """
        begun = self._unfinished()
        self._check_answers(begun, rows, table)
        counters = plain(counters)
        path = self._layout.answers_path(begun.next_number)
        whole = self._numbered(rows, table)
        try:
            write_parquet(path, self._temporary(path.name), whole.schema, [whole], self._stamp)
            file = FileRecord(path.name, path.stat().st_size)
            answers = AnswersRecord(file, len(rows), int(counters.get("failed", 0)), counters)
            begun.manifest.append_answers(answers)
            begun.answers.append(answers)
            begun.next_number += 1
            begun.finished[rows] = True
            begun.journaled = None
            if not begun.journal_is_empty:
                begun.journal.clear()
                begun.journal_is_empty = True
        except (OSError, pa.ArrowException) as error:
            raise self._cannot_write(error) from error

    def finish(self, summary: Mapping[str, Any], source: RowSource) -> None:
        """Make the output complete: join `source`'s rows with their answers, record the summary.

        Raises:
            InputError: the input cannot be read again.
            OutputError: it cannot be written, or answers are damaged; the answers are kept.
            ValueError: rows have no answer, or the output is complete already.
        """
        begun = self._unfinished()
        if missing := int((~begun.finished).sum()):
            first = int(np.argmin(begun.finished))
            raise ValueError(f"finish with {missing} rows unanswered, the first {first}")
        summary = plain(summary)
        scratch = self._temporary("join")
        paths = [self._layout.work / record.file.name for record in begun.answers]
        content = ContentHash(self.answer_schema)
        tables = join(source, paths, self.answer_schema, self.schema, self._job.num_rows, scratch)
        stream = RowStream(_hashed(tables, content))
        try:
            if self._layout.single_file:
                self._write_file(begun, stream, content, summary)
            else:
                self._write_parts(begun, stream, content, summary)
        except (OSError, pa.ArrowException) as error:
            raise self._cannot_write(error) from error
        except InputError as error:
            if str(error).startswith(str(self._layout.work)):
                raise OutputError(f"{error}; delete that file and run again to redo it") from error
            raise
        self.summary = summary
        begun.manifest.close()
        begun.journal.close()
        self._begun = None
        self._tidy(begun.lock)

    def close(self) -> None:
        """Give up the lock; what is on disk stays and can be resumed."""
        if self._begun is not None:
            self._begun.close()
            self._begun = None

    def __enter__(self) -> "OutputStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _unfinished(self) -> BegunOutput:
        if self._begun is None:
            raise ValueError("the output is complete or closed")
        return self._begun

    def _check_answers(self, begun: BegunOutput, rows: NDArray[np.int64], table: pa.Table) -> None:
        if not table.schema.equals(self.answer_schema):
            raise ValueError(f"answers are {table.schema}; declared are {self.answer_schema}")
        if table.num_rows != len(rows) or len(rows) == 0:
            raise ValueError(f"answers of {len(rows)} rows, the table has {table.num_rows}")
        if (np.diff(rows) <= 0).any():
            raise ValueError("the rows of answers are not ascending")
        if rows[0] < 0 or rows[-1] >= self._job.num_rows:
            raise ValueError(f"answer to row {rows[-1]}, but there are {self._job.num_rows} rows")
        if begun.finished[rows].any():
            raise ValueError(f"row {rows[begun.finished[rows]][0]} answered twice")

    def _write_file(
        self,
        begun: BegunOutput,
        stream: RowStream,
        content: ContentHash,
        summary: Mapping[str, Any],
    ) -> None:
        if os.path.lexists(self._layout.target) and not begun.replaces:
            raise OutputError(f"{self._layout.shown}: appeared while the job ran; move it away")

        def record() -> Mapping[str, Any]:
            return FinishedFile(self._job, summary, content.hexdigest()).record()

        tables = stream.take(self._job.num_rows)
        write_parquet(self._layout.target, self._temporary("output"), self.schema, tables, record)

    def _write_parts(
        self,
        begun: BegunOutput,
        stream: RowStream,
        content: ContentHash,
        summary: Mapping[str, Any],
    ) -> None:
        """Write the directory's parts, then mark it as complete."""
        parts = []
        # With no rows, a reader still needs one file to learn the columns from.
        for start in range(0, max(self._job.num_rows, 1), _PART_ROWS):
            rows = RowRange(start, min(start + _PART_ROWS, self._job.num_rows))
            path = self._layout.target / part_name(rows)
            tables = stream.take(rows.num_rows)
            write_parquet(path, self._temporary(path.name), self.schema, tables, self._stamp)
            parts.append(FileRecord(path.name, path.stat().st_size))
        begun.manifest.append_finished(FinishedRecord(summary, parts, content.hexdigest()))

    def _tidy(self, lock: OutputLock) -> None:
        """Leave a complete output as it should look. Nothing depends on it, so failing is fine."""
        layout = self._layout
        with suppress(OSError):
            if layout.single_file:
                shutil.rmtree(layout.work, ignore_errors=True)
            else:
                layout.clean(keep={path.name for path in layout.target.iterdir()})
                for path in layout.only_while_unfinished:
                    path.unlink(missing_ok=True)
                with atomic_write(layout.summary, self._temporary("summary")) as file:
                    file.write(json.dumps(self.summary, indent=2).encode() + b"\n")
        lock.release(delete=not layout.single_file)

    def _tidy_after_crash(self) -> None:
        """Do what a process that died right after completing the output had left to do."""
        layout = self._layout
        if layout.single_file:
            untidy = layout.work.exists()
        else:
            untidy = layout.lock.exists() or not layout.summary.exists()
        if untidy:
            with suppress(OSError, OutputError):
                self._tidy(OutputLock.acquire(layout.lock, layout.shown))

    def _numbered(self, rows: NDArray[np.int64], table: pa.Table) -> pa.Table:
        columns = [pa.chunked_array([rows]), *table.columns]
        return pa.Table.from_arrays(columns, schema=numbered_schema(self.answer_schema))

    def _stamp(self) -> Mapping[str, Any]:
        return stamp(self._job)

    def _temporary(self, name: str) -> Path:
        return self._layout.work / f"{name}.tmp"

    def _cannot_write(self, error: BaseException) -> OutputError:
        return OutputError(f"{self._layout.shown}: cannot be written: {one_line_reason(error)}")


def _hashed(tables: Iterator[pa.Table], content: ContentHash) -> Iterator[pa.Table]:
    for table in tables:
        content.update(table)
        yield table
