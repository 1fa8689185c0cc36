"""Progress on stderr: a live line on a terminal, one line every few seconds elsewhere."""

import sys
import time
from typing import TextIO

from batchllm.prefix.plan import PrefixPlan
from batchllm.scheduler.batch import Batch

_EVERY_SECONDS = 5.0
_LIVE_SECONDS = 0.2


class Progress:
    """Rows done, tokens a second, share of prompt tokens saved, and the time left.

    A window's answers all come late in it where what decodes most goes first, so the time left
    goes by tokens within a window, and by rows over the windows to come. It expects answers as long
    as they may be; where they end sooner, less is left than it says.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        done_rows: int = 0,
        stream: TextIO | None = None,
        quiet: bool = False,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._live = not quiet and self._stream.isatty()
        self._num_rows = num_rows
        self._done_before = self._done = done_rows
        self._prompt_tokens = 0
        self._tree_tokens = 0
        self._tokens = 0
        self._window_rows = 0
        self._window_tokens = 0  # to compute, at most
        self._before_window = (0, 0)  # rows and tokens
        self._started = self._shown = time.monotonic()

    def start_window(self, plan: PrefixPlan) -> None:
        """Take note of what a window's plan saves."""
        lengths = plan.tree.leaf_length * plan.tree.row_counts()
        self._prompt_tokens += int(lengths.sum())
        self._tree_tokens += plan.tree.num_tokens
        self._before_window = self._done, self._tokens
        self._window_rows = plan.tree.num_rows
        longest = plan.max_tokens[plan.tree.leaf_row]
        self._window_tokens = plan.tree.num_tokens + int(longest.sum())

    def on_step(self, batch: Batch) -> None:
        """Count a step, and show something if it is time."""
        self.add_tokens(batch.num_tokens * batch.num_steps)

    def add_tokens(self, count: int) -> None:
        """Count tokens computed, and show something if it is time."""
        self._tokens += count
        self._show()

    def finish_rows(self, count: int) -> None:
        """Count rows answered or failed."""
        self._done += count

    def note(self, text: str) -> None:
        """Print a line, between updates."""
        if not self._quiet:
            self._clear()
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the terminal clean."""
        self._clear()

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[2K")
            self._stream.flush()

    def _show(self) -> None:
        now = time.monotonic()
        if self._quiet or now - self._shown < (_LIVE_SECONDS if self._live else _EVERY_SECONDS):
            return
        self._shown = now
        line = self._line(now - self._started)
        self._stream.write(f"\r\x1b[2K{line}" if self._live else f"{line}\n")
        self._stream.flush()

    def _line(self, seconds: float) -> str:
        share = self._done / max(self._num_rows, 1)
        saved = 1 - self._tree_tokens / self._prompt_tokens if self._prompt_tokens else 0.0
        rows_before, tokens_before = self._before_window
        in_window = (self._tokens - tokens_before) / max(self._window_tokens, 1)
        worth = rows_before + max(in_window * self._window_rows, self._done - rows_before)
        here = worth - self._done_before
        left = seconds / here * (self._num_rows - worth) if here else None
        return (
            f"{self._done:,}/{self._num_rows:,} rows ({share:.0%})  "
            f"{self._tokens / max(seconds, 1e-9):,.0f} tokens/s computed  "
            f"{saved:.0%} of prompt tokens saved  "
            f"{'time left unknown yet' if left is None else f'{duration(left)} left'}"
        )


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42s, 3m 20s, 2h 05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
