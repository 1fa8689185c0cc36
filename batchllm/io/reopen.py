"""What is only done when the user says so: outputs deleted, and failed rows made undone."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchllm.errors import InputError, OutputError
from batchllm.io.durable import OutputLock, fsync_dir
from batchllm.io.join import ROW_COLUMN
from batchllm.io.layout import OutputLayout
from batchllm.io.manifest import AnswersRecord, FileRecord, Job, Manifest, read_manifest
from batchllm.io.parts import is_part_name, read_record, write_parquet
from batchllm.io.row_groups import ParquetReader
from batchllm.io.rows import Rows

Stamp = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class KeptAnswers:
    """A new file of answers, all of them good."""

    file: FileRecord
    num_rows: int


def keep_good(answers: Iterator[Rows], path: Path, error_column: str, stamp: Stamp) -> KeptAnswers:
    """Write those answers that have no value in `error_column` to a file of their own.

    Raises:
        InputError: the answers cannot be read.
        OSError: the file cannot be written.
    """
    num_rows = 0
    first = next(answers, None)

    def good() -> Iterator[pa.Table]:
        nonlocal num_rows
        rows = first
        while rows is not None:
            rows_good = pc.is_null(rows.table.column(error_column))
            table = rows.table.add_column(0, ROW_COLUMN, [pa.array(rows.index)]).filter(rows_good)
            num_rows += table.num_rows
            yield table
            rows = next(answers, None)

    assert first is not None, "a file of answers has some"
    schema = pa.schema([pa.field(ROW_COLUMN, pa.int64()), *first.table.schema])
    write_parquet(path, path.with_name(f"{path.name}.tmp"), schema, good(), stamp)
    return KeptAnswers(FileRecord(path.name, path.stat().st_size), num_rows)


def reopen(
    layout: OutputLayout, job: Job, answer_schema: pa.Schema, error_column: str, stamp: Stamp
) -> None:
    """Make a complete output an unfinished job, but for its good answers; the lock is held.

    A single file stays where it is until the one that takes its place is written. The parts of a
    directory do as well, but are not an output any more.

    Raises:
        InputError: the output cannot be read.
        OSError: it cannot be written.
    """
    state = read_manifest(layout.manifest)
    if layout.single_file and state is not None and not job.differences_from(state.job):
        return  # was reopened before
    done = layout.read_finished_file() if layout.single_file else None
    finished = done if state is None or layout.single_file else state.finished
    assert finished is not None, "only a complete output is reopened"
    path = layout.answers_path(0 if layout.single_file or state is None else state.next_number)
    kept = keep_good(_stored_answers(layout, answer_schema), path, error_column, stamp)
    record = AnswersRecord(kept.file, kept.num_rows, 0, {**finished.summary, "failed": 0})
    for old in layout.only_while_unfinished:
        old.unlink(missing_ok=True)
    if layout.single_file:
        Manifest.create(layout.manifest, job, [record]).close()
        return
    assert state is not None
    manifest = Manifest(layout.manifest, state.num_valid_bytes)
    with closing(manifest):
        manifest.append_reopened(record)


def _stored_answers(layout: OutputLayout, schema: pa.Schema) -> Iterator[Rows]:
    """The answers of a complete output, in row order."""
    paths = [layout.target]
    if not layout.single_file:
        paths = sorted(path for path in layout.target.iterdir() if is_part_name(path.name))
    at = 0
    for path in paths:
        with closing(ParquetReader(path)) as reader:
            for group in range(len(reader.footer.group_rows)):
                for batch in reader.batches(group, at, schema.names):
                    table = pa.Table.from_batches([batch]).select(schema.names).cast(schema)
                    yield Rows(np.arange(at, at + batch.num_rows), table)
                    at += batch.num_rows


def erase_other(layout: OutputLayout, job: Job) -> None:
    """Delete an output of ours that is complete, or unfinished and not this job's.

    Raises:
        OutputError: something that is not ours is there, or another process is writing it.
        OSError: it cannot be deleted.
    """
    if not layout.target.exists() and not layout.work.exists():
        return
    if layout.single_file:
        _refuse_other_file(layout)
    layout.refuse_foreign()
    lock = OutputLock.acquire(layout.lock, layout.shown)
    is_complete = layout.single_file and layout.target.exists()
    if is_complete:
        layout.target.unlink()
        fsync_dir(layout.target.parent)
    try:
        state = read_manifest(layout.manifest)
    except OutputError:  # damaged, or of another version
        state = None
    is_complete |= state is not None and state.finished is not None
    if state is not None and not is_complete and not job.differences_from(state.job):
        lock.release()
    else:
        forget(layout, lock)


def _refuse_other_file(layout: OutputLayout) -> None:
    if not layout.target.exists():
        return
    try:
        record = read_record(layout.target)
    except InputError:
        record = None
    if record is None or "summary" not in record:
        raise OutputError(
            f"{layout.shown}: exists and is no finished batchllm output; not even --overwrite "
            "deletes it"
        )


def forget(layout: OutputLayout, lock: OutputLock) -> None:
    """Delete everything of an output's, and what is empty then."""
    with suppress(OSError):
        layout.clean(keep=set())
        for path in (*layout.only_while_unfinished, layout.manifest):
            path.unlink(missing_ok=True)
    lock.release(delete=True)
    for folder in (layout.work, *([] if layout.single_file else [layout.target])):
        with suppress(OSError):
            folder.rmdir()
