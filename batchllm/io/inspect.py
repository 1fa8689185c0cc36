"""What a run did or has done so far, from its output alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from batchllm.errors import OutputError
from batchllm.io.durable import one_line_reason
from batchllm.io.journal import journaled_rows
from batchllm.io.layout import FinishedFile, OutputLayout
from batchllm.io.manifest import AnswersRecord, read_manifest


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run as its output tells it.

    `columns` are the output's, name to type, in order. `summary` and `answers_sha256`, the
    `ContentHash` of all answers, are None while unfinished. `answers` are the files of answers that
    an unfinished run has written; more of its rows may be finished, in its journal.
    """

    path: Path
    state: Literal["complete", "unfinished"]
    identity: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    num_rows: int
    num_finished_rows: int
    answers: tuple[AnswersRecord, ...]
    columns: Mapping[str, str]
    answers_sha256: str | None


def read_run(path: str | Path) -> RunRecord:
    """Read what the output at `path` says about its run; changes nothing, needs no lock.

    Raises:
        OutputError: there is no output of ours at `path`, or it cannot be read.
    """
    try:
        return _read_run(OutputLayout.of(path))
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {one_line_reason(error)}") from error


def _read_run(layout: OutputLayout) -> RunRecord:
    if (done := layout.read_finished_file()) is not None:
        return _complete(layout, done)
    state = read_manifest(layout.manifest) if layout.work.is_dir() else None
    if state is None:
        missing = not layout.target.exists()
        raise OutputError(
            f"{layout.shown}: {'no such output' if missing else 'not written by batchllm'}"
        )
    job, finished = state.job, state.finished
    if finished is not None and all(layout.has(part) for part in finished.parts):
        return _complete(layout, FinishedFile(job, finished.summary, finished.answers_sha256))
    answers = layout.intact_answers(state.answers)
    # A process that died as it emptied its journal may have left in it what is on record.
    num_finished = sum(record.num_rows for record in answers) + journaled_rows(layout.journal)
    return RunRecord(
        path=layout.shown,
        state="unfinished",
        identity=job.identity,
        summary=None,
        num_rows=job.num_rows,
        num_finished_rows=min(num_finished, job.num_rows),
        answers=tuple(answers),
        columns=job.columns,
        answers_sha256=None,
    )


def _complete(layout: OutputLayout, done: FinishedFile) -> RunRecord:
    return RunRecord(
        path=layout.shown,
        state="complete",
        identity=done.job.identity,
        summary=done.summary,
        num_rows=done.job.num_rows,
        num_finished_rows=done.job.num_rows,
        answers=(),
        columns=done.job.columns,
        answers_sha256=done.answers_sha256,
    )
