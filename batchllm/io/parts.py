"""Parquet out: files that are whole or absent.

Every file we write carries a `batchllm` entry in its key-value metadata (JSON) that says which job
it is from.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchllm.io.durable import atomic_write
from batchllm.io.row_groups import RUN_RECORD_KEY, ParquetReader
from batchllm.io.rows import RowRange

_PART_NAME = re.compile(r"part-\d{12,}-\d{12,}\.parquet")


def part_name(rows: RowRange) -> str:
    """The file name of a directory's part; names sort as rows do."""
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
    record: Callable[[], Mapping[str, Any]],
) -> None:
    """Write `tables` (one row group each or more) as `target`, whole and on disk, or not at all.

    `record` is asked for the file's entry when all tables are written.

    Raises:
        OSError: the file cannot be written.
        pa.ArrowException: Parquet cannot hold a column's type.
    """
    with atomic_write(target, temporary) as file, _writer(file, schema, record) as writer:
        for table in tables:
            writer.write_table(table)


@contextmanager
def _writer(
    file: IO[bytes], schema: pa.Schema, record: Callable[[], Mapping[str, Any]]
) -> Iterator[pq.ParquetWriter]:
    writer = pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True)
    try:
        yield writer
        writer.add_key_value_metadata({RUN_RECORD_KEY: json.dumps(record())})
        writer.close()
    except BaseException:
        writer.is_open = False  # or its destructor tries to finish the file, and fails noisily
        raise


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
