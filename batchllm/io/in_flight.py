"""Which rows were in flight when a process crashed, so that the one it died of can be found.

The rows in flight are written to a file whenever they change; what the kernel has got outlives the
process. If it ends by a fatal signal (a segmentation fault, an abort), `faulthandler` writes that
to another. Whoever comes next finds both: these rows are suspects, and are answered one at a time
before all others. If it then crashes again, the row that was alone in flight has done it twice, and
is set aside. A process that was killed from outside has written nothing, and makes nobody a
suspect.
"""

import faulthandler
import json
import os
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.io.durable import atomic_write
from batchllm.io.layout import OutputLayout

Rows = NDArray[np.int64]
_MOST_ROWS = 1 << 16  # duplicates of a row can be many; that those beyond are no suspects is fine
_NONE: Rows = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Suspects:
    """What earlier crashes of a job tell.

    Attributes:
        rows: those that may have done it, ascending.
        set_aside: those that have done it twice, once alone, ascending.
        reason: how the process ended, for people; empty if it never crashed.
    """

    rows: Rows
    set_aside: Rows
    reason: str

    @property
    def has_crashed(self) -> bool:
        return bool(self.reason)

    def but_for(self, finished: NDArray[np.bool_]) -> "Suspects":
        """Less the rows that are finished, [num_rows]."""
        left = [rows[rows < len(finished)] for rows in (self.rows, self.set_aside)]
        rows, set_aside = (rows[~finished[rows]] for rows in left)
        return Suspects(rows, set_aside, self.reason)


class InFlight:
    """Keeps the rows in flight where a crash does not reach them.

    Raises:
        OSError: the files cannot be made.
    """

    def __init__(self, layout: OutputLayout) -> None:
        self._layout = layout
        self._noted: tuple[Rows, bool] = _NONE, False
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._file = os.open(layout.in_flight, flags, 0o644)
        self._was_enabled = faulthandler.is_enabled()
        self._crash = layout.crash.open("w")
        self._is_kept = False
        faulthandler.enable(self._crash, all_threads=False)

    def note(self, rows: Rows, *, alone: bool) -> None:
        """These are in flight from now on; `alone` if they are duplicates of one."""
        noted, noted_alone = self._noted
        if alone == noted_alone and np.array_equal(rows, noted):
            return
        self._noted = rows, alone
        cells = np.concatenate([[min(len(rows), _MOST_ROWS), alone], rows[:_MOST_ROWS]])
        with suppress(OSError):  # a full disk is told by what needs it more
            os.pwrite(self._file, cells.astype(np.int64).tobytes(), 0)

    def keep(self, reason: str) -> None:
        """Another process of the job has crashed, of one of these; whoever comes next is told."""
        self._is_kept = True
        with suppress(OSError):
            self._crash.write(f"{reason}\n")
            self._crash.flush()

    def close(self) -> None:
        """The process leaves this part alive."""
        if self._was_enabled:
            faulthandler.enable(2)  # stderr, whatever became of sys.stderr
        else:
            faulthandler.disable()
        self._crash.close()
        os.close(self._file)
        if self._is_kept:
            return
        with suppress(OSError):  # an empty one says nothing, and goes with the others
            self._layout.crash.unlink(missing_ok=True)
            self._layout.in_flight.unlink(missing_ok=True)


def read_suspects(layout: OutputLayout) -> Suspects:
    """What the crash of the last process, if it did, adds to what is known from those before.

    It is put on record, so that a process that is killed before it has found out leaves it behind.

    Raises:
        OSError: a file cannot be read or written.
    """
    known = _read_known(layout)
    reason = layout.crash.read_text(errors="replace") if layout.crash.exists() else ""
    if not reason:
        return known
    reason = reason.splitlines()[0].removeprefix("Fatal Python error: ")[:80]
    rows, alone = _read_cells(layout)
    suspects = np.union1d(known.rows, rows)
    record = {"rows": suspects.tolist(), "reason": reason}
    with atomic_write(layout.suspects, layout.suspects.with_suffix(".tmp")) as file:
        file.write(json.dumps(record).encode())
    layout.crash.unlink()
    set_aside = np.unique(rows) if alone else _NONE
    return Suspects(np.setdiff1d(suspects, set_aside), set_aside, reason)


def _read_known(layout: OutputLayout) -> Suspects:
    try:
        record = json.loads(layout.suspects.read_bytes())
        return Suspects(np.array(record["rows"], dtype=np.int64), _NONE, str(record["reason"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return Suspects(_NONE, _NONE, "")


def _read_cells(layout: OutputLayout) -> tuple[Rows, bool]:
    try:
        cells = np.fromfile(layout.in_flight, dtype=np.int64)
    except FileNotFoundError:
        return _NONE, False
    if len(cells) < 2 or not 0 <= cells[0] <= len(cells) - 2:
        return _NONE, False
    return cells[2 : 2 + cells[0]], bool(cells[1])
