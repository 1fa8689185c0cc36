"""Outputs of a small table: started, written, read back."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import InMemory

from batchllm.errors import OutputError
from batchllm.io.output import OutputStore

IDENTITY = {"model": {"sha256": "a" * 64}, "sampling": {"max_tokens": 128}}
SCHEMA = pa.schema([pa.field("i", pa.int64())], metadata={"pandas": "{}", "custom": "kept"})
ANSWERS = pa.schema([pa.field("answer", pa.string())])
INPUT = pa.table({"i": range(10)}, schema=SCHEMA)
ANSWER = pa.table({"answer": [f"answer {i}" for i in range(10)]}, schema=ANSWERS)
TABLE = INPUT.append_column("answer", ANSWER["answer"])


def start(path, identity=IDENTITY, schema=SCHEMA, answers=ANSWERS, num_rows=10):
    return OutputStore.open(path, schema, answers, identity, num_rows=num_rows)


def write(store, *rows):
    rows = np.array(rows)
    store.write_answers(rows, ANSWER.take(rows), {"failed": 1, "steps": int(rows[-1])})


def finish(store, summary=None, table=INPUT):
    store.finish(summary or {}, InMemory(table))


def complete(path):
    with start(path) as store:
        for rows in [(4, 5, 8), (0, 2, 3, 6, 7), (1,), (9,)]:
            write(store, *rows)
        finish(store, {"rows": 10, "speed": 1.5})
    return store


def read(path):
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    return pa.concat_tables([pq.read_table(file, partitioning=None) for file in files])


def tree(root):
    return {str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir()}


def refused(path, **kwargs):
    with pytest.raises(OutputError) as caught:
        start(path, **kwargs)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def work_of(path):
    return path.parent / ".out.parquet.batchllm" if path.suffix else path / "_batchllm"
