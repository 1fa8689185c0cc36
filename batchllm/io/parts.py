"""Parquet out: files that are whole or absent, and the joining of parts into one file.

Every file we write carries a `batchllm` entry in its key-value metadata (JSON) that says which job
it is from.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchllm.io.durable import atomic_write
from batchllm.io.ranges import RowRange
from batchllm.io.row_groups import RUN_RECORD_KEY, ParquetReader
from batchllm.io.schema import conform

_PART_NAME = re.compile(r"part-\d{12,}-\d{12,}\.parquet")
# A joined file's row groups; the bytes bound the memory of joining.
_GROUP_ROWS = 128 * 1024
_GROUP_BYTES = 64 * 1024 * 1024


def part_name(rows: RowRange) -> str:
    """The file name of a window; names sort as rows do."""
    return f"part-{rows.start:012d}-{rows.end:012d}.parquet"


def is_part_name(name: str) -> bool:
    """Whether a file of this name is one of our parts."""
    return _PART_NAME.fullmatch(name) is not None


def without_record(schema: pa.Schema) -> pa.Schema:
    """`schema` without a `batchllm` entry, which would be another run's."""
    entries = {k: v for k, v in (schema.metadata or {}).items() if k != RUN_RECORD_KEY}
    return schema.with_metadata(entries or None)


def write_parquet(
    target: Path,
    temporary: Path,
    schema: pa.Schema,
    tables: Iterable[pa.Table],
    record: Mapping[str, Any],
) -> None:
    """Write `tables` (one row group each or more) as `target`, whole and on disk, or not at all.

    Raises:
        OSError: the file cannot be written.
        pa.ArrowException: Parquet cannot hold a column's type.
    """
    with atomic_write(target, temporary) as file, _writer(file, schema, record) as writer:
        for table in tables:
            writer.write_table(table)


@contextmanager
def _writer(
    file: IO[bytes], schema: pa.Schema, record: Mapping[str, Any]
) -> Iterator[pq.ParquetWriter]:
    writer = pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True)
    try:
        yield writer
        writer.add_key_value_metadata({RUN_RECORD_KEY: json.dumps(record)})
        writer.close()
    except BaseException:
        writer.is_open = False  # or its destructor tries to finish the file, and fails noisily
        raise


def read_parts(paths: Sequence[Path], schema: pa.Schema) -> Iterator[pa.Table]:
    """Stream parts in the given order as tables of the size of a row group.

    Raises:
        InputError: a part cannot be read.
    """
    held: list[pa.RecordBatch] = []
    num_rows = num_bytes = 0
    for batch in _batches(paths, schema):
        held.append(batch)
        num_rows += batch.num_rows
        num_bytes += batch.nbytes
        if num_rows >= _GROUP_ROWS or num_bytes >= _GROUP_BYTES:
            yield pa.Table.from_batches(held, schema=schema)
            held, num_rows, num_bytes = [], 0, 0
    if held:
        yield pa.Table.from_batches(held, schema=schema)


def _batches(paths: Sequence[Path], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for path in paths:
        with closing(ParquetReader(path)) as reader:
            for group in range(len(reader.footer.group_rows)):
                for batch in reader.batches(group, 0):
                    # Parquet has no type for some of Arrow's, such as seconds: back to declared.
                    yield conform(batch, schema, {})


def read_record(path: Path) -> dict[str, Any] | None:
    """The `batchllm` entry of a Parquet file's metadata; None where there is none.

    Raises:
        InputError: the file is not readable Parquet.
    """
    with closing(ParquetReader(path)) as reader:
        entry = reader.footer.run_record
    try:
        record = json.loads(entry or b"null")
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
