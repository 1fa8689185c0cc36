"""The passes over a table before it is answered: each takes a partition's record batches.

A look at a few rows, by which the driver cuts the sorted order of prompts into fine ranges
(`survey.py`); a count of what lies in each, by which it makes partitions of them; and then every
row gets its number in the table and its place.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from batchllm.errors import InputError
from batchllm.integrations.call import PLACE, ROW, GenerateCall
from batchllm.models.checkpoint import Checkpoint
from batchllm.prefix.partition import Ints, KeyRanges
from batchllm.prefix.tally import Counter, Tally
from batchllm.prompting import prompt_builder
from batchllm.text import columns
from batchllm.text.prompts import PromptBuilder


@dataclass(frozen=True, slots=True)
class Sample:
    """Some rows of a partition, all alike likely, with the columns prompts are made of."""

    rows: pa.Table
    num_rows: int


@dataclass(frozen=True, slots=True)
class Ranges:
    """What the driver found by the samples, for the passes after it.

    Attributes:
        call: with the rules for its fields' order.
        keys: the fine ranges.
        rate: which share of the prefixes is counted.
        first_row: the number of each input partition's first row, and at the end of all rows,
            [num_partitions + 1].
    """

    call: GenerateCall
    keys: KeyRanges
    rate: float
    first_row: Ints


def sample_rows(
    batches: Iterable[pa.RecordBatch], names: list[str], size: int, seed: int
) -> Sample:
    """Take at most `size` rows of a partition, with these columns; `seed` is its own."""
    rng = np.random.default_rng(seed)
    kept: list[pa.Table] = []
    lots = np.zeros(0)  # of the rows kept: those with the smallest stay
    num_rows = 0
    for batch in batches:
        num_rows += batch.num_rows
        drawn = rng.random(batch.num_rows)
        mine = np.flatnonzero(drawn < (lots.max() if len(lots) >= size else 1.0))
        if len(mine) == 0 and kept:
            continue
        kept.append(pa.Table.from_batches([batch]).select(names).take(pa.array(mine)))
        lots = np.concatenate([lots, drawn[mine]])
        if len(lots) > size:
            best = np.sort(np.argpartition(lots, size)[:size])
            kept, lots = [pa.concat_tables(kept).take(pa.array(best))], lots[best]
    return Sample(pa.concat_tables(kept) if kept else pa.table({}), num_rows)


def count_rows(batches: Iterable[pa.RecordBatch], ranges: Ranges, partition: int) -> Tally:
    """Count a partition's prompts by range."""
    counter = Counter(ranges.keys, ranges.rate)
    builder = _builder(ranges.call)
    row = int(ranges.first_row[partition])
    for batch in batches:
        table = pa.Table.from_batches([batch])
        deal = np.full(batch.num_rows, partition)
        counter.add(_keys(builder, table), deal, answer_lengths(ranges.call, table))
        row += batch.num_rows
    _check_count(row, ranges, partition)
    return counter.tally()


def place_rows(
    batches: Iterable[pa.RecordBatch], ranges: Ranges, partition: int, labels: Ints | None = None
) -> Iterator[pa.RecordBatch]:
    """Add each row's number in the table and its fine range, `ROW` and `PLACE`, int64.

    `labels` [num_ranges] stand in the ranges' place, if given. A row's place depends on its prompt
    and its input partition, and not on which row of the partition it is: an engine that makes a
    partition anew may give its rows in another order, and none may then be lost or doubled.
    """
    builder = _builder(ranges.call)
    row = int(ranges.first_row[partition])
    for batch in batches:
        table = pa.Table.from_batches([batch])
        numbers = row + np.arange(batch.num_rows)
        row += batch.num_rows
        if row > ranges.first_row[partition + 1]:
            break
        deal = np.full(batch.num_rows, partition)
        places = ranges.keys.assign(_keys(builder, table), deal)
        yield with_columns(
            batch, {ROW: numbers, PLACE: places if labels is None else labels[places]}
        )
    _check_count(row, ranges, partition)


def by_place(
    batches: Sequence[pa.RecordBatch], rows: Ints, places: Ints
) -> Iterator[pa.RecordBatch]:
    """Batches' rows in the order of their places, for `PartitionRun`: taken when they are due.

    From each batch for itself: to take from a table, Arrow would put it together in memory.

    Args:
        batches: without `ROW` and `PLACE`.
        rows: their rows' numbers in the table, [num_rows].
        places: and their places, [num_rows].
    """
    starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
    order = np.argsort(places, kind="stable")
    owners = np.searchsorted(starts, order, "right") - 1
    ends = np.flatnonzero((np.diff(places[order]) != 0) | (np.diff(owners) != 0)) + 1
    for mine in np.split(order, ends):
        if len(mine):
            owner = int(np.searchsorted(starts, mine[0], "right")) - 1
            batch = batches[owner].take(pa.array(mine - starts[owner]))
            yield with_columns(batch, {ROW: rows[mine], PLACE: places[mine]})


def with_columns(batch: pa.RecordBatch, added: dict[str, Ints]) -> pa.RecordBatch:
    """The batch with columns of int64 behind its own."""
    arrays = [*batch.columns, *(pa.array(values, pa.int64()) for values in added.values())]
    return pa.RecordBatch.from_arrays(arrays, schema=placed_schema(batch.schema, list(added)))


def placed_schema(schema: pa.Schema, names: Iterable[str] = (ROW, PLACE)) -> pa.Schema:
    """A table's schema with columns of ours behind its own."""
    ours = [pa.field(name, pa.int64(), nullable=False) for name in names]
    return pa.schema([*schema, *ours], metadata=schema.metadata)


def answer_lengths(call: GenerateCall, table: pa.Table) -> Ints:
    """How long each row's answer may be, [num_rows]."""
    limit = call.params.max_tokens
    name = call.spec.max_tokens_column
    if name is None:
        return np.full(table.num_rows, limit, dtype=np.int64)
    own = columns.max_tokens_rows(table[name], {})
    return np.where(own > 0, own, limit).astype(np.int64)


def _keys(builder: PromptBuilder, table: pa.Table) -> list[bytes]:
    """What rows are sorted by; a bad row's is empty."""
    return [key or b"" for key in builder.keys(table)]


def _builder(call: GenerateCall) -> PromptBuilder:
    return builder_of(call, call.model.open())


def builder_of(call: GenerateCall, checkpoint: Checkpoint) -> PromptBuilder:
    """What makes the call's prompts; no weights are read."""
    return prompt_builder(checkpoint, call.config, call.spec, call.field_rules)


def _check_count(row: int, ranges: Ranges, partition: int) -> None:
    if row != ranges.first_row[partition + 1]:
        raise InputError(
            f"input partition {partition} had "
            f"{ranges.first_row[partition + 1] - ranges.first_row[partition]:,} rows at first and "
            "has another number now: what the table is made of changed, or is drawn anew each "
            "time it is read; write it to files first, or have the engine keep it (persist)"
        )
