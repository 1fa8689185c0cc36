"""`batchllm` in a child of this process, which has imported everything: it starts in no time."""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path


class Fault(IntEnum):
    """What the shim makes of the chosen file operation (see `shim.c`)."""

    NONE = 0
    ERROR = 1
    FULL = 2
    SHORT = 3
    KILL_BEFORE = 4
    KILL_AFTER = 5
    KILL_HALF = 6

    @property
    def kills(self) -> bool:
        return self >= Fault.KILL_BEFORE


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended: exit code (negative: a signal's number), stderr, file operations seen."""

    code: int
    stderr: str
    num_operations: int


def run(
    words: Sequence[str],
    scratch: Path,
    *,
    fault: Fault = Fault.NONE,
    at: int = -1,
    below: Path | None = None,
    kill_after: float | None = None,
) -> Ended:
    """Run `batchllm WORDS`.

    Args:
        words: the command line.
        scratch: a directory for its stderr.
        fault: what happens to a file operation.
        at: which one, counted from 0.
        below: the directory whose files count.
        kill_after: seconds until it is killed, if it still runs.
    """
    stderr, seen = scratch / "stderr", scratch / "seen"
    seen.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _be_batchllm(words, stderr, seen, fault, at, below)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        done, status = os.waitpid(pid, 0 if deadline is None else os.WNOHANG)
        if done:
            break
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = None
        else:
            time.sleep(0.001)
    count = int(seen.read_text()) if seen.exists() else 0
    return Ended(os.waitstatus_to_exitcode(status), stderr.read_text(), count)


def _be_batchllm(
    words: Sequence[str], stderr: Path, seen: Path, fault: Fault, at: int, below: Path | None
) -> None:
    """The child; never returns."""
    code = 99
    try:
        handle = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        shim = ctypes.CDLL(None)
        if below is not None:
            shim.fault_arm(str(below).encode(), int(fault), ctypes.c_long(at))
        from batchllm.cli import app

        try:
            app([str(word) for word in words])
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        if below is not None:
            shim.fault_seen.restype = ctypes.c_long
            seen.write_text(str(shim.fault_seen()))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
