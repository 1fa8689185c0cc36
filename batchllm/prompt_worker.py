"""The next window's prompts, made by a process of its own while the engine answers this one's.

A thread would not do: rendering holds Python's lock, and every operation of the engine would wait
for it. From the second window on the process has the lowest priority, so that it takes what the
engine leaves; for the first, everybody waits. Where it cannot be started, and for tables too small
to be worth it, prompts are made here instead. A row that it dies of costs that row.
"""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa

from batchllm.request import RaggedTokens, RowError
from batchllm.text.prompts import PromptBatch, PromptBuilder
from batchllm.windows import Window

_WORTH_ROWS = 1000  # starting a process takes as long as making the prompts of a few thousand rows
_COMMAND = ["-m", "batchllm.prompt_worker"]
_LOST = (OSError, EOFError, pickle.UnpicklingError)  # what a dead process makes of its pipes
_NO_PROMPT = PromptBatch(
    RaggedTokens.from_sequences([[]]),
    {0: RowError("process_died", "the process that made this row's prompt died of it, twice")},
    None,
)


@dataclass(frozen=True, slots=True)
class PromptedWindow:
    """A window and its prompts; `waited_seconds` is what making them kept the engine waiting."""

    window: Window
    prompts: PromptBatch
    waited_seconds: float


class PromptWorker:
    """A process that makes prompts of one table at a time.

    `always` has it make those of small tables too, where a row may be one that processes die of.
    """

    def __init__(self, builder: PromptBuilder, *, always: bool = False) -> None:
        self._builder = builder
        self._worth_rows = 0 if always else _WORTH_ROWS
        self._table: pa.Table | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def begin(self, table: pa.Table) -> None:
        """Have a table's prompts made; `finish` must come before the next."""
        assert self._table is None, "one table at a time"
        self._table = table
        if self._process is None and table.num_rows >= self._worth_rows and not self._is_closed:
            self._start()
        self._send(table)

    def finish(self) -> PromptBatch:
        """The prompts of the table, as `PromptBuilder.build` makes them."""
        assert self._table is not None, "no table begun"
        table, self._table = self._table, None
        if self._process is None:
            return self._builder.build(table)
        return self._receive() or self._by_halves(table)

    def close(self) -> None:
        """End the process, whatever it is at; there will be no other."""
        self._is_closed = True
        self._end_process()

    def _receive(self) -> PromptBatch | None:
        """What the process made; None if it died."""
        assert self._process is not None and self._process.stdout is not None
        try:
            batch: PromptBatch = pickle.load(self._process.stdout)
            return batch
        except _LOST:
            self._end_process()
            return None

    def _try(self, table: pa.Table) -> PromptBatch | None:
        """The table's prompts by a process, a new one if need be; None if it died."""
        if self._process is None and not self._is_closed:
            self._start()
        self._send(table)
        return None if self._process is None else self._receive()

    def _by_halves(self, table: pa.Table) -> PromptBatch:
        """The prompts of a table that a process died of, but for the row it dies of if it is one.

        It takes two processes to blame a row: one died of it together with others, one of it alone.
        """
        if (batch := self._try(table)) is not None:
            return batch
        if self._try(table.slice(0, 0)) is None:  # no process lives here, whatever the rows
            return self._builder.build(table)
        if table.num_rows == 1:
            return _NO_PROMPT
        half = table.num_rows // 2
        return PromptBatch.concat(
            [self._by_halves(table.slice(0, half)), self._by_halves(table.slice(half))]
        )

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> None:
        with suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable, *_COMMAND],
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
                self._end_process()


def prompts_ahead(windows: Iterable[Window], worker: PromptWorker) -> Iterator[PromptedWindow]:
    """Each window with its prompts, the next one's being read and made meanwhile.

    The first is begun when this is called, so that a model can be loaded at the same time.
    """
    remaining = iter(windows)
    reader = ThreadPoolExecutor(1)  # reading and sending hardly hold Python's lock
    return _one_ahead(remaining, worker, reader, reader.submit(_begin_next, remaining, worker))


def _one_ahead(
    remaining: Iterator[Window],
    worker: PromptWorker,
    reader: ThreadPoolExecutor,
    begun: "Future[Window | None]",
) -> Iterator[PromptedWindow]:
    try:
        while True:
            started = time.perf_counter()
            window = begun.result()
            if window is None:
                return
            prompts = worker.finish()
            waited = time.perf_counter() - started
            begun = reader.submit(_begin_next, remaining, worker)
            yield PromptedWindow(window, prompts, waited)
    finally:
        reader.shutdown(wait=False)


def _begin_next(remaining: Iterator[Window], worker: PromptWorker) -> Window | None:
    window = next(remaining, None)
    if window is not None:
        worker.begin(window.rows.table)
    return window


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
