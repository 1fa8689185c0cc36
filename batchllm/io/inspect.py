"""What a run did or has done so far, from its output alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from batchllm.errors import OutputError
from batchllm.io.durable import one_line_reason
from batchllm.io.layout import OutputLayout
from batchllm.io.manifest import WindowRecord, read_manifest
from batchllm.io.ranges import gaps


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run as its output tells it.

    `summary` is None while unfinished. `windows` are the finished windows in row order; a complete
    single file keeps only the summary of them.
    """

    path: Path
    state: Literal["complete", "unfinished"]
    identity: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    num_rows: int
    num_finished_rows: int
    windows: tuple[WindowRecord, ...]


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
    windows = layout.intact_windows(state)
    num_missing = sum(gap.num_rows for gap in gaps(state.job.num_rows, windows))
    complete = state.summary is not None and num_missing == 0
    return RunRecord(
        layout.shown,
        "complete" if complete else "unfinished",
        state.job.identity,
        state.summary if complete else None,
        state.job.num_rows,
        state.job.num_rows - num_missing,
        tuple(windows[rows] for rows in sorted(windows)),
    )
