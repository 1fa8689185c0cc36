"""What a run did or has done so far, from its output alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from batchllm.errors import OutputError
from batchllm.io.durable import one_line_reason
from batchllm.io.journal import journaled_rows
from batchllm.io.layout import OutputLayout
from batchllm.io.manifest import AnswersRecord, read_manifest


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run as its output tells it.

    `summary` is None while unfinished. `answers` are the files of answers that an unfinished run
    has written; more of its rows may be finished, in its journal.
    """

    path: Path
    state: Literal["complete", "unfinished"]
    identity: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    num_rows: int
    num_finished_rows: int
    answers: tuple[AnswersRecord, ...]


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
        num_rows = done.job.num_rows
        return RunRecord(
            layout.shown, "complete", done.job.identity, done.summary, num_rows, num_rows, ()
        )
    state = read_manifest(layout.manifest) if layout.work.is_dir() else None
    if state is None:
        missing = not layout.target.exists()
        raise OutputError(
            f"{layout.shown}: {'no such output' if missing else 'not written by batchllm'}"
        )
    num_rows = state.job.num_rows
    if state.finished is not None and all(layout.has(part) for part in state.finished.parts):
        summary = state.finished.summary
        return RunRecord(
            layout.shown, "complete", state.job.identity, summary, num_rows, num_rows, ()
        )
    answers = layout.intact_answers(state.answers)
    return RunRecord(
        layout.shown,
        "unfinished",
        state.job.identity,
        None,
        num_rows,
        # A process that died as it emptied its journal may have left in it what is on record.
        min(sum(record.num_rows for record in answers) + journaled_rows(layout.journal), num_rows),
        tuple(answers),
    )
