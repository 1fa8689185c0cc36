"""Being asked to stop: by Ctrl-C, by a scheduler's SIGTERM, by a terminal that closes.

The first signal lets a step in progress end where somebody waits for it (`waited_for`), and else
interrupts at once; the second ends the process on the spot, which loses no more than a kill would.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """While entered, handles the signals that ask a process to stop; main thread only.

    A signal that is ignored (nohup's SIGHUP, SIGINT in a shell's background job) stays so.
    """

    def __init__(self) -> None:
        self.requested = False
        self._waits = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def waited_for(self) -> Iterator[None]:
        """Within, a first signal only sets `requested`; the caller looks there after each step."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(INTERRUPTED)
        self.requested = True
        if not self._waits:
            raise KeyboardInterrupt
        # Not through sys.stderr, which may be in the middle of writing.
        os.write(2, b"\nstopping after this step; once more to stop at once\n")
