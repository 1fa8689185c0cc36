"""A partition of placed rows, answered: what every engine's tasks call."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from batchllm.integrations.call import PLACE, ROW, GenerateCall
from batchllm.integrations.held import HOLDER, Loaded, ModelHolder
from batchllm.integrations.summary import PartitionReport, common_tokens
from batchllm.metrics import Metrics
from batchllm.prompting import prompt_builder
from batchllm.request import RaggedTokens, TokenIds
from batchllm.text.prompts import PromptBuilder

WINDOW_BYTES = 512 << 20  # of a window's rows: their texts, tokens and tree take a few times that


@dataclass(slots=True)
class PartitionRun:
    """Answers a partition, a window at a time, and counts what it takes.

    Rows must come with `ROW` and, for windows to be cut where little is shared, in the order of
    `PLACE`. They leave in the order of their numbers within each window, without `PLACE`, and with
    `ROW` behind the columns that answers add.

    Args:
        call: what is generated.
        partition: its number.
        holder: of the worker's model.
    """

    call: GenerateCall
    partition: int
    holder: ModelHolder = HOLDER
    _metrics: Metrics = field(default_factory=Metrics)
    _loaded: Loaded | None = None
    _first: TokenIds | None = None
    _last: TokenIds | None = None
    _granularity: int = 1
    _seconds: float = 0.0

    def answer(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Answer the rows.

        Raises:
            BatchLLMError: the model cannot be loaded or run; bad rows are answers with an error.
        """
        for window in _windows(batches, self.call.window_rows):
            begun = time.perf_counter()
            answered = self._answer_window(window)
            self._seconds += time.perf_counter() - begun
            yield from answered.to_batches()

    @property
    def report(self) -> PartitionReport:
        """What it took so far."""
        return PartitionReport(
            partition=self.partition,
            metrics=self._metrics,
            loaded=self._loaded,
            first=self._first,
            last=self._last,
            granularity=self._granularity,
            seconds=self._seconds,
        )

    def _answer_window(self, window: pa.Table) -> pa.Table:
        numbers = window[ROW].to_numpy()
        order = np.argsort(numbers)
        window, numbers = window.take(pa.array(order)), numbers[order]
        table = window.drop_columns([name for name in (ROW, PLACE) if name in window.column_names])
        added = self.call.check(table.schema)
        with self.holder.use(self.call) as (llm, self._loaded):
            call, llm.metrics = self.call, Metrics()
            begun = time.perf_counter()
            builder = prompt_builder(llm.checkpoint, call.config, call.spec, call.field_rules)
            prompts = builder.build(table)
            requests, errors = prompts.requests(call.params, numbers)
            llm.metrics.prompt_seconds += time.perf_counter() - begun
            outputs = llm.answer(requests, errors)
            metrics, self._granularity = llm.metrics, llm.loaded.granularity
        metrics.window_repeated_tokens += self._follow(window, builder, prompts.tokens)
        self._metrics.add(metrics)
        answered = added.append(table, outputs).combine_chunks()
        return answered.append_column(pa.field(ROW, pa.int64(), nullable=False), [numbers])

    def _follow(self, window: pa.Table, builder: PromptBuilder, tokens: RaggedTokens) -> int:
        """Note a window's first and last prompt; returns what it repeats of the one before it.

        Without places nobody knows which windows are neighbours.
        """
        if PLACE not in window.column_names:
            return 0
        places = window[PLACE].to_numpy()
        outer = np.flatnonzero((places == places.min()) | (places == places.max()))
        keys = builder.keys(window.take(pa.array(outer)))
        ends = sorted((key, row) for key, row in zip(keys, outer.tolist(), strict=True) if key)
        fine = [row for _, row in ends if len(tokens[row])]
        if not fine:
            return 0
        first, last = tokens[fine[0]].copy(), tokens[fine[-1]].copy()
        repeated = common_tokens(self._last, first, self._granularity)
        self._first = first if self._first is None else self._first
        self._last = last
        return repeated


def answers_only(batch: pa.RecordBatch, added: pa.Schema) -> pa.RecordBatch:
    """Of answered rows their numbers and the answer columns, by the names that `added` has.

    For whoever hands in only the columns that prompts are made of: which names are free depends on
    the others, too.
    """
    columns = batch.columns
    row = pa.field(ROW, pa.int64(), nullable=False)
    return pa.RecordBatch.from_arrays(
        [columns[-1], *columns[-1 - len(added) : -1]], schema=pa.schema([row, *added])
    )


def _windows(batches: Iterable[pa.RecordBatch], window_rows: int) -> Iterator[pa.Table]:
    """Tables of about so many rows, cut where the place changes, if it does."""
    kept: list[pa.RecordBatch] = []
    num_rows = num_bytes = 0
    for batch in batches:
        if batch.num_rows == 0:
            continue
        kept.append(batch)
        num_rows += batch.num_rows
        num_bytes += batch.nbytes
        if num_rows < window_rows and num_bytes < WINDOW_BYTES:
            continue
        table = pa.Table.from_batches(kept)
        while table.num_rows >= window_rows:
            cut = _cut(table, window_rows)
            yield table.slice(0, cut)
            table = table.slice(cut)
        if table.nbytes >= WINDOW_BYTES:
            yield table
            table = table.slice(0, 0)
        kept, num_rows, num_bytes = table.to_batches(), table.num_rows, table.nbytes
    if num_rows:
        yield pa.Table.from_batches(kept)


def _cut(table: pa.Table, most: int) -> int:
    """Where a window of at most so many rows ends best: where a place does, in its second half."""
    if PLACE not in table.column_names or most == table.num_rows:
        return most
    places = table[PLACE].to_numpy()[: most + 1]
    ends = np.flatnonzero(places[1:] != places[:-1]) + 1
    return int(ends[-1]) if len(ends) and ends[-1] * 2 >= most else most
