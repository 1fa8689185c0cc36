"""The output of a job: answers written in any order, resumable after a crash at any point.

Answers of some rows are on disk in this order: their file under a temporary name, fsync, rename,
fsync of the directory, and only then its manifest line. So a file without a line may be anything
and is thrown away, and a line without its file cannot come about by a crash. When every row has an
answer, input and answers are joined in row order; the memory of that is bounded by a row group.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchllm.errors import InputError, OutputError
from batchllm.io.durable import OutputLock, atomic_write, fsync_dir, one_line_reason
from batchllm.io.identity import plain
from batchllm.io.join import ROW_COLUMN, RowSource, RowStream, join, read_answers
from batchllm.io.layout import FinishedFile, OutputLayout
from batchllm.io.manifest import (
    FORMAT_VERSION,
    AnswersRecord,
    FileRecord,
    FinishedRecord,
    Job,
    Manifest,
    read_manifest,
)
from batchllm.io.parts import part_name, without_record, write_parquet
from batchllm.io.rows import RowRange

_PART_ROWS = 1_000_000  # of a directory's parts


class OutputStore:
    """One job's output, new, resumed or already complete. Use `open`; not for two threads at once.

    Attributes:
        schema: the output's: the input's columns, then the answers'.
        answer_schema: the answers' columns.
        summary: the summary of a complete output, else None.
        finished: which rows have their answer on disk, bool [num_rows].
    """

    def __init__(
        self, layout: OutputLayout, schema: pa.Schema, answer_schema: pa.Schema, job: Job
    ) -> None:
        self.schema = schema
        self.answer_schema = answer_schema
        self.summary: dict[str, Any] | None = None
        self.finished: NDArray[np.bool_] = np.zeros(job.num_rows, dtype=np.bool_)
        self._layout = layout
        self._job = job
        self._answers: list[AnswersRecord] = []
        self._next_number = 0
        self._lock: OutputLock | None = None
        self._manifest: Manifest | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        schema: pa.Schema,
        answer_schema: pa.Schema,
        identity: Mapping[str, Any],
        *,
        num_rows: int,
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

        Raises:
            OutputError: the output belongs to a different job, to another program or to a process
                that is writing it right now; or the place cannot be written.
        """
        layout = OutputLayout.of(path)
        schema = without_record(pa.schema([*schema, *answer_schema], metadata=schema.metadata))
        columns = {column.name: str(column.type) for column in schema}
        store = cls(layout, schema, answer_schema, Job(plain(identity), num_rows, columns))
        try:
            if store._load_complete():
                store._tidy_after_crash()
            else:
                store._start_or_resume()
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
    def counters(self) -> list[dict[str, Any]]:
        """The counters that came with the answers, in the order of writing."""
        return [dict(record.counters) for record in self._answers]

    def write_answers(
        self, rows: NDArray[np.int64], table: pa.Table, counters: Mapping[str, Any]
    ) -> None:
        """Put the answers of some rows on disk and then on record.

        Args:
            rows: the rows' numbers, ascending, [num_rows of the table].
            table: their answers.
            counters: plain data to keep with them; `failed` is how many failed.

        Raises:
            OutputError: it cannot be written; the output is as it was before.
            ValueError: the table is not what was declared for these rows, or they are done already.
        """
        manifest = self._check_answers(rows, table)
        counters = plain(counters)
        path = self._layout.answers_path(self._next_number)
        record = {"version": FORMAT_VERSION, "identity": self._job.identity}
        schema = pa.schema([pa.field(ROW_COLUMN, pa.int64()), *self.answer_schema])
        whole = pa.Table.from_arrays([pa.chunked_array([rows]), *table.columns], schema=schema)
        try:
            write_parquet(path, self._temporary(path.name), schema, [whole], record)
            file = FileRecord(path.name, path.stat().st_size)
            answers = AnswersRecord(file, len(rows), int(counters.get("failed", 0)), counters)
            manifest.append_answers(answers)
        except (OSError, pa.ArrowException) as error:
            raise self._cannot_write(error) from error
        self._answers.append(answers)
        self._next_number += 1
        self.finished[rows] = True

    def finish(self, summary: Mapping[str, Any], source: RowSource) -> None:
        """Make the output complete: join `source`'s rows with their answers, record the summary.

        Raises:
            InputError: the input cannot be read again.
            OutputError: it cannot be written, or answers are damaged; the answers are kept.
            ValueError: rows have no answer, or the output is complete already.
        """
        if self._manifest is None or self._lock is None:
            raise ValueError("finish on an output that is complete or closed")
        if missing := int((~self.finished).sum()):
            first = int(np.argmin(self.finished))
            raise ValueError(f"finish with {missing} rows unanswered, the first {first}")
        summary = plain(summary)
        scratch = self._temporary("join")
        paths = [self._layout.work / record.file.name for record in self._answers]
        tables = join(source, paths, self.answer_schema, self.schema, self._job.num_rows, scratch)
        try:
            if self._layout.single_file:
                self._write_file(RowStream(tables), summary)
            else:
                self._write_parts(RowStream(tables), self._manifest, summary)
        except (OSError, pa.ArrowException) as error:
            raise self._cannot_write(error) from error
        except InputError as error:
            if str(error).startswith(str(self._layout.work)):
                raise OutputError(f"{error}; delete that file and run again to redo it") from error
            raise
        self.summary = summary
        self._tidy(self._lock)
        self.close()

    def close(self) -> None:
        """Give up the lock. What is on disk stays and can be resumed; nothing done leaves nothing.

        A job that failed before its first answers (a wrong option, say) would otherwise stand in
        the way of the corrected one.
        """
        if self._manifest is not None:
            self._manifest.close()
        if self._lock is not None:
            if self._answers or self.is_complete:
                self._lock.release()
            else:
                self._forget(self._lock)
        self._manifest = self._lock = None

    def __enter__(self) -> "OutputStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _load_complete(self) -> bool:
        """Whether the finished output of this very job is there; never writes."""
        layout = self._layout
        if layout.single_file:
            if (done := layout.read_finished_file()) is None:
                return False
            self._refuse_other_job(done.job)
            return self._complete(done.summary)
        layout.refuse_foreign()
        if (state := read_manifest(layout.manifest)) is None or state.finished is None:
            return False
        self._refuse_other_job(state.job)
        for part in state.finished.parts:
            if not layout.has(part):
                raise OutputError(
                    f"{layout.target / part.name}: is missing or not as it was written; "
                    f"put it back, or delete {layout.to_delete} to start over"
                )
        return self._complete(state.finished.summary)

    def _complete(self, summary: Mapping[str, Any]) -> bool:
        self.summary = dict(summary)
        self.finished[:] = True
        return True

    def _start_or_resume(self) -> None:
        layout = self._layout
        layout.refuse_foreign()
        made = [path for path in (layout.work, layout.target) if not path.exists()]
        try:
            self._lock = OutputLock.acquire(layout.lock, layout.shown)
            if self._load_complete():  # by a process that held the lock until now
                self._tidy(self._lock)
                return
            self._manifest = self._open_manifest()
            layout.clean(keep={record.file.name for record in self._answers})
        except Exception:
            if self._lock is not None:
                self._lock.release(delete=bool(made))
            self.close()
            for path in made:
                with suppress(OSError):
                    path.rmdir()
            raise

    def _open_manifest(self) -> Manifest:
        layout = self._layout
        state = read_manifest(layout.manifest)
        if state is not None:
            self._answers = layout.intact_answers(state.answers)
        if state is None or (not self._answers and self._job.differences_from(state.job)):
            # None, or another job's that died before it had done anything.
            manifest = Manifest.create(layout.manifest, self._job)
            for folder in {layout.work.parent, layout.target.parent}:
                fsync_dir(folder)
            return manifest
        self._refuse_other_job(state.job)
        self._next_number = len(state.answers)
        self._mark_finished()
        return Manifest(layout.manifest, state.num_valid_bytes)

    def _mark_finished(self) -> None:
        """Mark the rows that an earlier run has answered."""
        for record in self._answers:
            path = self._layout.work / record.file.name
            try:
                pieces = list(read_answers(path, pa.schema([])))
            except InputError as error:
                raise OutputError(f"{error}; delete that file and run again to redo it") from error
            rows = np.concatenate([piece.index for piece in pieces])
            if rows.max(initial=0) >= len(self.finished) or self.finished[rows].any():
                raise OutputError(
                    f"{self._layout.shown}: {path.name} has rows twice, or not the input's; "
                    f"delete {self._layout.to_delete} to start over"
                )
            self.finished[rows] = True

    def _refuse_other_job(self, other: Job) -> None:
        if found := self._job.differences_from(other):
            raise OutputError(
                f"{self._layout.shown} was started by a different job: {found}. Use another output"
                f" path, or delete {self._layout.to_delete} to start over"
            )

    def _check_answers(self, rows: NDArray[np.int64], table: pa.Table) -> Manifest:
        if self._manifest is None:
            raise ValueError("answers written to an output that is complete or closed")
        if not table.schema.equals(self.answer_schema):
            raise ValueError(f"answers are {table.schema}; declared are {self.answer_schema}")
        if table.num_rows != len(rows) or len(rows) == 0:
            raise ValueError(f"answers of {len(rows)} rows, the table has {table.num_rows}")
        if (np.diff(rows) <= 0).any():
            raise ValueError("the rows of answers are not ascending")
        if rows[0] < 0 or rows[-1] >= self._job.num_rows:
            raise ValueError(f"answer to row {rows[-1]}, but there are {self._job.num_rows} rows")
        if self.finished[rows].any():
            raise ValueError(f"row {rows[self.finished[rows]][0]} answered twice")
        return self._manifest

    def _write_file(self, stream: RowStream, summary: Mapping[str, Any]) -> None:
        if os.path.lexists(self._layout.target):
            raise OutputError(f"{self._layout.shown}: appeared while the job ran; move it away")
        record = FinishedFile(self._job, summary).record()
        tables = stream.take(self._job.num_rows)
        temporary = self._temporary("output")
        write_parquet(self._layout.target, temporary, self.schema, tables, record)

    def _write_parts(
        self, stream: RowStream, manifest: Manifest, summary: Mapping[str, Any]
    ) -> None:
        """Write the directory's parts, then mark it as complete."""
        parts = []
        # With no rows, a reader still needs one file to learn the columns from.
        for start in range(0, max(self._job.num_rows, 1), _PART_ROWS):
            rows = RowRange(start, min(start + _PART_ROWS, self._job.num_rows))
            path = self._layout.target / part_name(rows)
            record = {"version": FORMAT_VERSION, "identity": self._job.identity}
            tables = stream.take(rows.num_rows)
            write_parquet(path, self._temporary(path.name), self.schema, tables, record)
            parts.append(FileRecord(path.name, path.stat().st_size))
        manifest.append_finished(FinishedRecord(summary, parts))

    def _tidy(self, lock: OutputLock) -> None:
        """Leave a complete output as it should look. Nothing depends on it, so failing is fine."""
        layout = self._layout
        with suppress(OSError):
            if layout.single_file:
                shutil.rmtree(layout.work, ignore_errors=True)
            else:
                layout.clean(keep={path.name for path in layout.target.iterdir()})
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

    def _forget(self, lock: OutputLock) -> None:
        layout = self._layout
        with suppress(OSError):
            layout.clean(keep=set())
            layout.manifest.unlink(missing_ok=True)
        lock.release(delete=True)
        for folder in (layout.work, *([] if layout.single_file else [layout.target])):
            with suppress(OSError):
                folder.rmdir()

    def _temporary(self, name: str) -> Path:
        return self._layout.work / f"{name}.tmp"

    def _cannot_write(self, error: BaseException) -> OutputError:
        return OutputError(f"{self._layout.shown}: cannot be written: {one_line_reason(error)}")
