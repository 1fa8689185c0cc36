"""The output of a job: windows written in any order, resumable after a crash at any point.

A window is on disk in this order: its part under a temporary name, fsync, rename, fsync of the
directory, and only then its manifest line. So a part without a line may be anything and is thrown
away, and a line without its part cannot come about by a crash. A single file is joined from its
parts at the end, which needs disk space for both, and its memory is bounded by a row group.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from batchllm.errors import InputError, OutputError
from batchllm.io.durable import OutputLock, atomic_write, fsync_dir, one_line_reason
from batchllm.io.identity import plain
from batchllm.io.layout import FinishedFile, OutputLayout
from batchllm.io.manifest import FORMAT_VERSION, Job, Manifest, WindowRecord, read_manifest
from batchllm.io.parts import part_name, read_parts, without_record, write_parquet
from batchllm.io.ranges import RowRange, gaps


class OutputStore:
    """One job's output, new, resumed or already complete. Use `open`; not for two threads at once.

    Attributes:
        schema: the declared schema, of every part and of the whole.
        summary: the summary of a complete output, else None.
    """

    def __init__(self, layout: OutputLayout, schema: pa.Schema, job: Job) -> None:
        self.schema = schema
        self.summary: dict[str, Any] | None = None
        self._layout = layout
        self._job = job
        self._windows: dict[RowRange, WindowRecord] = {}
        self._lock: OutputLock | None = None
        self._manifest: Manifest | None = None

    @classmethod
    def open(
        cls, path: str | Path, schema: pa.Schema, identity: Mapping[str, Any], *, num_rows: int
    ) -> "OutputStore":
        """Start the output of a job of `num_rows` rows at `path`, or take it up where it stopped.

        A path that ends in `.parquet` or `.pq` is a file, any other a directory; missing parents
        are made. `identity` is nested plain data, everything that must be the same for the answers
        to belong together. A complete output is not locked and not written to.

        Raises:
            OutputError: the output belongs to a different job, to another program or to a process
                that is writing it right now; or the place cannot be written.
        """
        layout = OutputLayout.of(path)
        columns = {column.name: str(column.type) for column in schema}
        store = cls(layout, without_record(schema), Job(plain(identity), num_rows, columns))
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
    def finished(self) -> list[RowRange]:
        """The ranges on disk, ascending."""
        if self.is_complete and self._layout.single_file:
            return [RowRange(0, self._job.num_rows)] if self._job.num_rows else []
        return sorted(self._windows)

    @property
    def window_counters(self) -> list[dict[str, Any]]:
        """The counters of each finished window, in row order; a complete file has none left."""
        return [dict(self._windows[rows].counters) for rows in sorted(self._windows)]

    def write_window(self, rows: RowRange, table: pa.Table, counters: Mapping[str, Any]) -> None:
        """Put one window on disk and then on record. `counters["failed"]` is its failed rows.

        Raises:
            OutputError: it cannot be written; the output is as it was before.
            ValueError: the table is not what was declared for these rows, or they are done already.
        """
        manifest = self._check_window(rows, table)
        counters = plain(counters)
        name = part_name(rows)
        part = self._layout.parts / name
        record = {
            "version": FORMAT_VERSION,
            "identity": self._job.identity,
            "rows": [rows.start, rows.end],
            "counters": counters,
        }
        try:
            write_parquet(part, self._temporary(name), self.schema, [table], record)
            failed = int(counters.get("failed", 0))
            window = WindowRecord(rows, name, part.stat().st_size, failed, counters)
            manifest.append_window(window)
        except (OSError, pa.ArrowException) as error:
            raise self._cannot_write(error) from error
        self._windows[rows] = window

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Make the output complete: join the parts of a single file, record the summary.

        Raises:
            OutputError: it cannot be written, or a part is damaged; the parts are kept.
            ValueError: rows are missing, or the output is complete already.
        """
        if self._manifest is None or self._lock is None:
            raise ValueError("finish on an output that is complete or closed")
        if missing := gaps(self._job.num_rows, self._windows):
            raise ValueError(f"finish with {len(missing)} gaps, the first {missing[0]}")
        summary = plain(summary)
        try:
            if self._layout.single_file:
                self._join(summary)
            else:
                self._seal(self._manifest, summary)
        except (OSError, pa.ArrowException) as error:
            raise self._cannot_write(error) from error
        self.summary = summary
        self._tidy(self._lock)
        self.close()

    def close(self) -> None:
        """Give up the lock. What is on disk stays and can be resumed; nothing done leaves nothing.

        A job that failed before its first window (a wrong option, say) would otherwise stand in the
        way of the corrected one.
        """
        if self._manifest is not None:
            self._manifest.close()
        if self._lock is not None:
            if self._windows or self.is_complete:
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
            self.summary = dict(done.summary)
            return True
        layout.refuse_foreign()
        if (state := read_manifest(layout.manifest)) is None:
            return False
        self._windows = layout.intact_windows(state)
        if self._windows or state.summary is not None:
            self._refuse_other_job(state.job)
        if state.summary is None or gaps(self._job.num_rows, self._windows):
            return False
        self.summary = dict(state.summary)
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
            layout.clean(keep={record.file for record in self._windows.values()})
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
        self._windows = {} if state is None else layout.intact_windows(state)
        if state is None or (not self._windows and self._job.differences_from(state.job)):
            # None, or another job's that died before it had done anything.
            manifest = Manifest.create(layout.manifest, self._job)
            for folder in {layout.work.parent, layout.target.parent}:
                fsync_dir(folder)
            return manifest
        self._refuse_other_job(state.job)
        if any(one.end > after.start for one, after in pairwise(sorted(self._windows))):
            raise OutputError(
                f"{layout.manifest}: has rows twice; delete {layout.to_delete} to start over"
            )
        return Manifest(layout.manifest, state.num_valid_bytes)

    def _refuse_other_job(self, other: Job) -> None:
        if found := self._job.differences_from(other):
            raise OutputError(
                f"{self._layout.shown} was started by a different job: {found}. Use another output"
                f" path, or delete {self._layout.to_delete} to start over"
            )

    def _check_window(self, rows: RowRange, table: pa.Table) -> Manifest:
        if self._manifest is None:
            raise ValueError(f"{rows} written to an output that is complete or closed")
        if not table.schema.equals(self.schema):
            raise ValueError(f"{rows} have columns {table.schema}; declared are {self.schema}")
        if table.num_rows != rows.num_rows or rows.num_rows == 0:
            raise ValueError(f"{rows} are {rows.num_rows} rows, the table has {table.num_rows}")
        if rows.end > self._job.num_rows:
            raise ValueError(f"{rows} written, but there are only {self._job.num_rows} rows")
        if any(done.start < rows.end and rows.start < done.end for done in self._windows):
            raise ValueError(f"{rows} written twice")
        return self._manifest

    def _join(self, summary: Mapping[str, Any]) -> None:
        """Write the single file from its parts."""
        if os.path.lexists(self._layout.target):
            raise OutputError(f"{self._layout.shown}: appeared while the job ran; move it away")
        paths = [self._layout.parts / self._windows[rows].file for rows in sorted(self._windows)]
        record = FinishedFile(self._job, summary).record()
        temporary = self._temporary("output")
        try:
            tables = read_parts(paths, self.schema)
            write_parquet(self._layout.target, temporary, self.schema, tables, record)
        except InputError as error:
            raise OutputError(f"{error}; delete that part and run again to redo it") from error

    def _seal(self, manifest: Manifest, summary: Mapping[str, Any]) -> None:
        """Mark the directory as complete."""
        if self._job.num_rows == 0:  # a reader still needs one file to learn the columns from
            name = part_name(RowRange(0, 0))
            record = {"version": FORMAT_VERSION, "identity": self._job.identity}
            part = self._layout.parts / name
            write_parquet(part, self._temporary(name), self.schema, [], record)
        manifest.append_finished(summary)

    def _tidy(self, lock: OutputLock) -> None:
        """Leave a complete output as it should look. Nothing depends on it, so failing is fine."""
        layout = self._layout
        with suppress(OSError):
            if layout.single_file:
                shutil.rmtree(layout.work, ignore_errors=True)
            else:
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
        for folder in (layout.parts, layout.work, *([] if layout.single_file else [layout.target])):
            with suppress(OSError):
                folder.rmdir()

    def _temporary(self, name: str) -> Path:
        return self._layout.work / f"{name}.tmp"

    def _cannot_write(self, error: BaseException) -> OutputError:
        return OutputError(f"{self._layout.shown}: cannot be written: {one_line_reason(error)}")
