"""What an output tells about its run, finished or not."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import InMemory

from batchllm.errors import OutputError
from batchllm.io.inspect import read_run
from batchllm.io.output import OutputStore

SCHEMA = pa.schema([("i", pa.int64())])
ANSWERS = pa.schema([("answer", pa.int64())])
INPUT = InMemory(pa.table({"i": range(2)}, schema=SCHEMA))


@pytest.fixture(params=["out.parquet", "out"])
def path(request, tmp_path):
    return tmp_path / request.param


def write(store, start, end):
    rows = np.arange(start, end)
    store.write_answers(rows, pa.table({"answer": rows}, schema=ANSWERS), {"failed": 1})


def test_an_unfinished_run_is_read_while_it_is_written(path):
    with OutputStore.open(path, SCHEMA, ANSWERS, {"a": {"b": 1}}, num_rows=10) as store:
        write(store, 6, 8)
        write(store, 0, 2)
        run = read_run(str(path))
    assert (run.state, run.summary) == ("unfinished", None)
    assert (run.num_rows, run.num_finished_rows) == (10, 4)
    assert run.identity == {"a": {"b": 1}}
    assert [a.num_rows for a in run.answers] == [2, 2]
    assert [a.failed for a in run.answers] == [1, 1]


def test_a_complete_run(path):
    with OutputStore.open(path, SCHEMA, ANSWERS, {"a": 1}, num_rows=2) as store:
        write(store, 0, 2)
        store.finish({"rows": 2}, INPUT)
    run = read_run(path)
    assert (run.state, run.summary, run.identity) == ("complete", {"rows": 2}, {"a": 1})
    assert (run.num_rows, run.num_finished_rows) == (2, 2)


def test_a_directory_that_lost_a_part_is_not_complete(tmp_path):
    path = tmp_path / "out"
    with OutputStore.open(path, SCHEMA, ANSWERS, {}, num_rows=2) as store:
        write(store, 0, 2)
        store.finish({}, INPUT)
    next(path.glob("*.parquet")).unlink()
    run = read_run(path)
    assert (run.state, run.summary, run.num_finished_rows) == ("unfinished", None, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no such output"),
        ("nothing.parquet", "no such output"),
        ("foreign.parquet", "no finished batchllm output"),
        ("text.parquet", "not a Parquet file"),
        ("folder", "not written by batchllm"),
        ("text", "not written by batchllm"),
    ],
)
def test_what_is_not_ours_is_said_in_one_line(tmp_path, name, message):
    pq.write_table(pa.table({"i": [1]}), tmp_path / "foreign.parquet")
    (tmp_path / "text.parquet").write_text("text")
    (tmp_path / "text").write_text("text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=message) as caught:
        read_run(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
