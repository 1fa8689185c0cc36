"""What lies at an output's place when a job comes to it, and what of it the job goes on from."""

from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchllm.errors import InputError, OutputError
from batchllm.io.durable import OutputLock, fsync_dir
from batchllm.io.in_flight import Suspects, read_suspects
from batchllm.io.join import ROW_COLUMN, read_answers
from batchllm.io.journal import Journal, read_journal
from batchllm.io.layout import FinishedFile, OutputLayout
from batchllm.io.manifest import FORMAT_VERSION, AnswersRecord, Job, Manifest, read_manifest
from batchllm.io.reopen import forget, keep_good, reopen
from batchllm.io.rows import Rows


def numbered_schema(answer_schema: pa.Schema) -> pa.Schema:
    """Of answers on disk: which rows they are of comes first."""
    return pa.schema([pa.field(ROW_COLUMN, pa.int64()), *answer_schema])


def stamp(job: Job) -> dict[str, object]:
    """What our entry in a file says that is no output by itself."""
    return {"version": FORMAT_VERSION, "identity": job.identity}


def refuse_busy(layout: OutputLayout) -> None:
    """Refuse an output that a process is writing, before anything that takes time.

    Raises:
        OutputError: it is.
    """
    if OutputLock.is_held(layout.lock):
        raise OutputLock.busy(layout.shown)


def refuse_other_job(layout: OutputLayout, job: Job, stored: Job) -> None:
    """Make sure that what is stored is of this job.

    Raises:
        OutputError: it is not; the message says what differs.
    """
    if found := job.differences_from(stored):
        raise OutputError(
            f"{layout.shown} was started by a different job: {found}. Use another output path, "
            f"or start over with --overwrite, which deletes {layout.to_delete}"
        )


def load_complete(layout: OutputLayout, job: Job) -> FinishedFile | None:
    """What the finished output of this very job says, if it is there; never writes.

    Raises:
        OutputError: another job's output is there, or something else, or parts of it are missing.
    """
    if layout.single_file:
        done = layout.read_finished_file()
        if done is not None:
            refuse_other_job(layout, job, done.job)
        return done
    layout.refuse_foreign()
    if (state := read_manifest(layout.manifest)) is None or state.finished is None:
        return None
    refuse_other_job(layout, job, state.job)
    for part in state.finished.parts:
        if not layout.has(part):
            raise OutputError(
                f"{layout.target / part.name}: is missing or not as it was written; "
                f"put it back, or delete {layout.to_delete} to start over"
            )
    return FinishedFile(state.job, state.finished.summary, state.finished.answers_sha256)


@dataclass(slots=True)
class BegunOutput:
    """An unfinished output, locked for this process.

    Attributes:
        answers: the answers on disk, in the order of writing.
        next_number: of the next file of answers.
        finished: which rows they are of, bool [num_rows].
        journaled: what an earlier process left in the journal, ascending, with nothing that is
            finished; None where there is nothing.
        suspects: what crashes of earlier processes tell, of rows that are not finished.
        replaces: whether a complete output of the same job may be in the way.
    """

    layout: OutputLayout
    job: Job
    answer_schema: pa.Schema
    lock: OutputLock
    manifest: Manifest
    journal: Journal
    finished: NDArray[np.bool_]
    suspects: Suspects
    answers: list[AnswersRecord] = field(default_factory=list)
    next_number: int = 0
    journaled: Rows | None = None
    journal_is_empty: bool = True
    replaces: bool = False

    def close(self) -> None:
        """Give up the lock. What is on disk stays and can be resumed; nothing done leaves nothing.

        A job that failed before its first answers (a wrong option, say) would otherwise stand in
        the way of the corrected one. What a crash of a process of its own may have come from stays.
        """
        self.manifest.close()
        self.journal.close()
        if self.answers or not self.journal_is_empty or self.layout.crash.exists():
            self.lock.release()
        else:
            forget(self.layout, self.lock)


def begin(
    layout: OutputLayout, job: Job, answer_schema: pa.Schema, *, retry: str | None
) -> BegunOutput | FinishedFile:
    """Start a job's output, or take it up; or find that another process has just finished it.

    Args:
        layout: where.
        job: what.
        answer_schema: the columns that answers add.
        retry: a column of answers; rows that have a value in it are to be answered again.

    Raises:
        OutputError: something else is there, or another process is writing it, or it is damaged.
        OSError: it cannot be written.
    """
    layout.refuse_foreign()
    made = [path for path in (layout.work, layout.target) if not path.exists()]
    lock: OutputLock | None = None
    try:
        lock = OutputLock.acquire(layout.lock, layout.shown)
        if (done := load_complete(layout, job)) is not None:
            if retry is None or not done.has_failed:
                lock.release()
                return done
            reopen(layout, job, answer_schema, retry, lambda: stamp(job))
        begun = _go_on(layout, job, answer_schema, lock, retry)
        begun.replaces = done is not None
        layout.clean(keep={record.file.name for record in begun.answers})
    except Exception:
        if lock is not None:
            lock.release(delete=bool(made))
        for path in made:
            with suppress(OSError):
                path.rmdir()
        raise
    return begun


def _go_on(
    layout: OutputLayout, job: Job, answer_schema: pa.Schema, lock: OutputLock, retry: str | None
) -> BegunOutput:
    state = read_manifest(layout.manifest)
    answers = [] if state is None else layout.intact_answers(state.answers)
    left: list[pa.RecordBatch] = []
    num_bytes = 0
    if state is not None:
        left, num_bytes = read_journal(layout.journal, numbered_schema(answer_schema))
    if state is None or (not answers and not left and job.differences_from(state.job)):
        # None, or another job's that died before it had done anything.
        manifest, next_number = Manifest.create(layout.manifest, job), 0
        for folder in {layout.work.parent, layout.target.parent}:
            fsync_dir(folder)
    else:
        refuse_other_job(layout, job, state.job)
        manifest, next_number = Manifest(layout.manifest, state.num_valid_bytes), state.next_number
    journal = Journal(layout.journal, num_bytes)
    finished = np.zeros(job.num_rows, dtype=np.bool_)
    suspects = read_suspects(layout)
    begun = BegunOutput(
        layout,
        job,
        answer_schema,
        lock,
        manifest,
        journal,
        finished,
        suspects,
        answers,
        next_number,
    )
    try:
        if retry is not None:
            _drop_failed(begun, retry)
        _mark_finished(begun)
        _take_over(begun, left)
        begun.suspects = suspects.but_for(begun.finished)
    except Exception:
        manifest.close()
        journal.close()
        raise
    return begun


def _drop_failed(begun: BegunOutput, error_column: str) -> None:
    """Take the rows that failed out of the answers."""
    for number, record in enumerate(begun.answers):
        if record.failed:
            rows = read_answers(begun.layout.work / record.file.name, begun.answer_schema)
            path = begun.layout.answers_path(begun.next_number)
            kept = keep_good(rows, path, error_column, lambda: stamp(begun.job))
            counters = {**record.counters, "failed": 0}
            better = AnswersRecord(kept.file, kept.num_rows, 0, counters)
            begun.manifest.append_answers(better, replaces=record.file.name)
            begun.answers[number] = better
            begun.next_number += 1


def _mark_finished(begun: BegunOutput) -> None:
    """Mark the rows that an earlier run has answered."""
    for record in begun.answers:
        path = begun.layout.work / record.file.name
        try:
            pieces = list(read_answers(path, pa.schema([])))
        except InputError as error:
            raise OutputError(f"{error}; delete that file and run again to redo it") from error
        rows = np.concatenate([np.zeros(0, np.int64), *(piece.index for piece in pieces)])
        if rows.max(initial=0) >= len(begun.finished) or begun.finished[rows].any():
            raise OutputError(
                f"{begun.layout.shown}: {path.name} has rows twice, or not the input's; "
                f"delete {begun.layout.to_delete} to start over"
            )
        begun.finished[rows] = True


def _take_over(begun: BegunOutput, left: list[pa.RecordBatch]) -> None:
    """Of what an earlier process journaled, the rows that got into no file of answers."""
    if not left:
        return
    begun.journal_is_empty = False
    table = pa.Table.from_batches(left, numbered_schema(begun.answer_schema))
    index = table.column(0).to_numpy()
    if index.min() < 0 or index.max() >= len(begun.finished):
        raise OutputError(f"{begun.layout.journal}: has rows that are not the input's")
    rows = Rows(index, table.remove_column(0)).where(~begun.finished[index])
    rows = rows.take(np.unique(rows.index, return_index=True)[1])
    begun.journaled = rows if len(rows.index) else None
