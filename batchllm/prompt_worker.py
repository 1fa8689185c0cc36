"""The next window's prompts, made by a process of its own while the engine answers this one's.

A thread would not do: rendering holds Python's lock, and every operation of the engine would wait
for it. From the second window on the process has the lowest priority, so that it takes what the
engine leaves; for the first, everybody waits. Where it cannot be started or dies, and for tables
too small to be worth it, prompts are made here instead.
"""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

import pyarrow as pa

from batchllm.text.prompts import PromptBatch, PromptBuilder
from batchllm.windows import Window

_WORTH_ROWS = 1000  # starting a process takes as long as making the prompts of a few thousand rows
_LOST = (OSError, EOFError, pickle.UnpicklingError)  # what a dead process makes of its pipes


@dataclass(frozen=True, slots=True)
class PromptedWindow:
    """A window and its prompts; `waited_seconds` is what making them kept the engine waiting."""

    window: Window
    prompts: PromptBatch
    waited_seconds: float


class PromptWorker:
    """A process that makes prompts of one table at a time."""

    def __init__(self, builder: PromptBuilder) -> None:
        self._builder = builder
        self._table: pa.Table | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self, table: pa.Table) -> None:
        """Have a table's prompts made; `finish` must come before the next."""
        assert self._table is None, "one table at a time"
        self._table = table
        if self._process is None and table.num_rows >= _WORTH_ROWS:
            self._start()
        self._send(table)

    def finish(self) -> PromptBatch:
        """The prompts of the table, as `PromptBuilder.build` makes them."""
        assert self._table is not None, "no table begun"
        table, self._table = self._table, None
        if self._process is not None:
            assert self._process.stdout is not None
            try:
                batch: PromptBatch = pickle.load(self._process.stdout)
                return batch
            except _LOST:
                self.close()
        return self._builder.build(table)

    def close(self) -> None:
        """End the process, whatever it is at."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def __enter__(self) -> "PromptWorker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        with suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "batchllm.prompt_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # a terminal's interrupt is for us to handle
            )
            self._send(self._builder)

    def _send(self, message: PromptBuilder | pa.Table) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            try:
                pickle.dump(message, self._process.stdin, protocol=5)
                self._process.stdin.flush()
            except _LOST:
                self.close()


def prompts_ahead(windows: Iterable[Window], worker: PromptWorker) -> Iterator[PromptedWindow]:
    """Each window with its prompts, the next one's in the making.

    The first is begun at once, when this is called, so that it can be made while a model loads.
    """
    remaining = iter(windows)
    first = next(remaining, None)
    if first is not None:
        worker.begin(first.rows.table)
    return _one_ahead(first, remaining, worker)


def _one_ahead(
    window: Window | None, remaining: Iterator[Window], worker: PromptWorker
) -> Iterator[PromptedWindow]:
    while window is not None:
        started = time.perf_counter()
        prompts = worker.finish()
        following = next(remaining, None)
        if following is not None:
            worker.begin(following.rows.table)
        yield PromptedWindow(window, prompts, time.perf_counter() - started)
        window = following


def main() -> None:
    """The process: a builder, then tables, come in; prompts go out."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that prints gets among the answers
    with suppress(*_LOST):
        builder: PromptBuilder = pickle.load(source)
        while True:
            prompts = builder.build(pickle.load(source))
            pickle.dump(prompts, sink, protocol=5)
            sink.flush()
            os.nice(19)


if __name__ == "__main__":
    main()
