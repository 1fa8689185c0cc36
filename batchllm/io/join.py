"""A job's rows and their answers, which were written in any order, put side by side."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchllm.errors import InputError
from batchllm.io.row_groups import ParquetReader
from batchllm.io.rows import Rows
from batchllm.io.schema import conform
from batchllm.io.spool import Spool

ROW_COLUMN = "__row__"  # of files of answers: which rows they are of
# Row groups of the output; the bytes bound the memory of joining.
_GROUP_ROWS = 128 * 1024
_GROUP_BYTES = 64 * 1024 * 1024
_BUCKET_ROWS = 32 * 1024


class RowSource(Protocol):
    """Gives a job's rows, ascending, with every column of its input."""

    def read(self, wanted: NDArray[np.bool_] | None = None) -> Iterator[Rows]:
        """Yield the wanted rows, a batch at a time."""
        ...


def read_answers(path: Path, schema: pa.Schema) -> Iterator[Rows]:
    """The answers of one file, a batch at a time; `schema` are the columns wanted of them.

    Raises:
        InputError: the file cannot be read.
    """
    with closing(ParquetReader(path)) as reader:
        for group in range(len(reader.footer.group_rows)):
            for batch in reader.batches(group, 0, [ROW_COLUMN, *schema.names]):
                try:
                    # Parquet has no type for some of Arrow's, such as seconds: back to declared.
                    table = pa.Table.from_batches([conform(batch, schema, {})], schema)
                    index = batch.column(ROW_COLUMN).to_numpy()
                except (pa.ArrowException, KeyError, ValueError) as error:
                    raise InputError(f"{path}: not a file of answers: {error}") from error
                yield Rows(index, table)


def join(
    source: RowSource,
    answers: Sequence[Path],
    answer_schema: pa.Schema,
    schema: pa.Schema,
    num_rows: int,
    scratch: Path,
) -> Iterator[pa.Table]:
    """Yield the output, ascending, in tables of the size of a batch.

    Args:
        source: the input.
        answers: files with, between them, one answer for each of the first `num_rows` rows.
        answer_schema: their columns.
        schema: the output's columns: the input's, then theirs.
        num_rows: rows of the job.
        scratch: a directory for what memory cannot hold.

    Raises:
        InputError: a file cannot be read.
        OutputError: the scratch directory cannot be written.
    """
    with closing(Spool(scratch, answer_schema, -(-num_rows // _BUCKET_ROWS))) as spool:
        for rows in chain.from_iterable(read_answers(path, answer_schema) for path in answers):
            spool.add(rows, rows.index // _BUCKET_ROWS)
        in_order = RowStream(_ascending(spool))
        for rows in source.read(np.ones(num_rows, dtype=np.bool_)):
            answered = pa.concat_tables(in_order.take(rows.table.num_rows))
            columns = [*rows.table.columns, *answered.columns]
            yield pa.Table.from_arrays(columns, schema=schema)


def _ascending(spool: Spool) -> Iterator[pa.Table]:
    for bucket in range(len(spool.counts)):
        rows = spool.read(bucket)
        first = bucket * _BUCKET_ROWS
        assert np.array_equal(rows.index, np.arange(first, first + len(rows.index)))
        yield rows.table


class RowStream:
    """Tables that follow each other, taken by numbers of rows."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self._rest: pa.Table | None = None

    def take(self, num_rows: int) -> Iterator[pa.Table]:
        """The next rows, in tables of the size of a row group."""
        held: list[pa.Table] = []
        held_rows = held_bytes = 0
        while num_rows:
            table = next(self._tables) if self._rest is None else self._rest
            self._rest = table.slice(num_rows) if table.num_rows > num_rows else None
            table = table.slice(0, num_rows)
            num_rows -= table.num_rows
            held.append(table)
            held_rows += table.num_rows
            held_bytes += table.nbytes
            if held_rows >= _GROUP_ROWS or held_bytes >= _GROUP_BYTES:
                yield pa.concat_tables(held)
                held, held_rows, held_bytes = [], 0, 0
        if held:
            yield pa.concat_tables(held)
