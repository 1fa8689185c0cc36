"""What runs on a Ray cluster for each block. Imports no torch: many processes run a few of these.

A block's prompts are dealt out to partitions and gathered there, answered, and the answers go back
the same way to the blocks, whose own columns never travel.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from batchllm.integrations.call import PLACE, ROW
from batchllm.integrations.passes import (
    Ranges,
    Sample,
    count_rows,
    place_rows,
    placed_schema,
)
from batchllm.integrations.passes import sample_rows as sample_batches
from batchllm.prefix.partition import Ints
from batchllm.prefix.tally import Tally

REPORT = "__batchllm_report"
"""The column of answers in which a partition's last row has its report."""


@dataclass(frozen=True, slots=True)
class Dealing:
    """How blocks are dealt out: `names` are the columns of prompts, `of_range` the partitions."""

    ranges: Ranges
    names: list[str]
    of_range: Ints

    @property
    def count(self) -> int:
        return int(self.of_range[-1]) + 1


def schema_of(block: pa.Table) -> pa.Schema:
    """A block's schema."""
    return block.schema


def sample_block(block: pa.Table, names: list[str], size: int, number: int) -> Sample:
    """Some of a block's rows."""
    return sample_batches(block.to_batches(), names, size, number)


def count_block(block: pa.Table, names: list[str], ranges: Ranges, number: int) -> Tally:
    """A block's prompts, counted."""
    return count_rows(block.select(names).to_batches(), ranges, number)


def deal_block(block: pa.Table, dealing: Dealing, number: int) -> list[pa.Table] | pa.Table:
    """A block's prompts with their numbers and places: a table for each partition."""
    prompts = block.select(dealing.names)
    placed = pa.Table.from_batches(
        place_rows(prompts.to_batches(), dealing.ranges, number), placed_schema(prompts.schema)
    )
    pieces = _dealt(placed, dealing.of_range[placed[PLACE].to_numpy()], dealing.count)
    return pieces if len(pieces) > 1 else pieces[0]  # Ray takes a single result as it is


def gather(*pieces: pa.Table) -> pa.Table:
    """All blocks' pieces for a partition."""
    return pa.concat_tables(pieces, promote_options="permissive")


def return_block(answered: pa.Table, first_row: Ints) -> list[Any]:
    """Answers for each of the input's blocks, and behind them the reports, pickled."""
    reports = answered[REPORT].drop_null().to_pylist()
    block = np.searchsorted(first_row, answered[ROW].to_numpy(), "right") - 1
    return [*_dealt(answered.drop_columns([REPORT]), block, len(first_row) - 1), reports]


def finish_block(block: pa.Table, added: pa.Schema, *pieces: pa.Table) -> pa.Table:
    """One of the input's blocks, with the answers to its rows."""
    row = pa.field(ROW, pa.int64(), nullable=False)
    answers = pa.concat_tables([pa.schema([row, *added]).empty_table(), *pieces]).sort_by(ROW)
    assert answers.num_rows == block.num_rows, f"{answers.num_rows} answers, {block.num_rows} rows"
    for field in added:
        block = block.append_column(field, answers[field.name])
    return block


def _dealt(table: pa.Table, of_row: Ints, count: int) -> list[pa.Table]:
    """The rows of each of so many; copies, since Ray may send a slice with all it was cut from."""
    order = np.argsort(of_row, kind="stable")
    ends = np.searchsorted(of_row[order], np.arange(count + 1))
    return [table.take(pa.array(order[begin:end])) for begin, end in pairwise(ends)]
