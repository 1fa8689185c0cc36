"""A job killed before or after any of its system calls, then run again: same table, nothing left.

The dying call raises a BaseException, which no clean-up code catches, so what is on disk is what a
kill would leave. In a second kind of run the call fails as a disk does, with an OSError.
"""

import os
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import InMemory

from batchllm.errors import OutputError
from batchllm.io.durable import OutputLock
from batchllm.io.inspect import read_run
from batchllm.io.journal import Journal
from batchllm.io.manifest import Manifest
from batchllm.io.output import OutputStore

SCHEMA = pa.schema([("i", pa.int64())])
ANSWERS = pa.schema([("answer", pa.int64()), ("error", pa.string())])
INPUT = InMemory(pa.table({"i": range(5)}, schema=SCHEMA))
CALLS = ("fsync", "replace", "pwrite", "ftruncate", "unlink", "rmdir", "mkdir")


class KilledError(BaseException):
    pass


class Faults:
    """Counts the watched calls; makes number `at` die before or after it does its work."""

    def __init__(self, monkeypatch, kind, at):
        self.num_calls = 0
        self.log = []
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name), kind, at))

    def wrap(self, name, original, kind, at):
        def call(*args, **kwargs):
            number = self.num_calls
            self.num_calls += 1
            self.log.append(name)
            if number == at and kind == "killed before":
                raise KilledError
            if number == at and kind == "disk error":
                raise OSError(5, "disk")
            result = original(*args, **kwargs)
            if number == at and kind == "killed after":
                raise KilledError
            return result

        return call


@pytest.fixture
def kill(monkeypatch):
    """Do what the kernel does for a dead process: close the files it had open."""
    opened = []
    for kind, name in ((OutputLock, "release"), (Manifest, "close"), (Journal, "close")):

        def init(self, *args, original=kind.__init__, closer=name):
            original(self, *args)
            opened.append(getattr(self, closer))

        monkeypatch.setattr(kind, "__init__", init)

    def close_all():
        while opened:
            opened.pop()()

    return close_all


def answers(rows, failing=()):
    return pa.table(
        {
            "answer": [None if row in failing else 10 * row for row in rows],
            "error": ["bad" if row in failing else None for row in rows],
        },
        schema=ANSWERS,
    )


def write(store, *rows, failing=()):
    table = answers(rows, failing)
    failed = len(set(rows) & set(failing))
    store.write_answers(np.array(rows), table, {"rows": len(rows), "failed": failed})


def run_job(path, failing=(), retry=None, overwrite=False):
    store = OutputStore.open(
        path, SCHEMA, ANSWERS, {"job": 1}, num_rows=5, retry=retry, overwrite=overwrite
    )
    if store.is_complete:
        return
    if store.journaled is not None:
        table = store.journaled.table
        failed = len(table) - table["error"].null_count
        store.write_answers(store.journaled.index, table, {"failed": failed})
    for rows in ([0, 3], [1, 4], [2]):
        left = [row for row in rows if not store.finished[row]]
        for row in left:
            store.journal(np.array([row]), answers([row], failing))
        if left:
            write(store, *left, failing=failing)
    store.finish({"rows": 5, "failed": store.num_failed}, INPUT)


WHOLE = {"i": [0, 1, 2, 3, 4], "answer": [0, 10, 20, 30, 40], "error": [None] * 5}
HALF = {**WHOLE, "answer": [0, None, 20, None, 40], "error": [None, "bad", None, "bad", None]}


def read(path):
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    tables = [pq.read_table(file, partitioning=None) for file in files]
    return pa.concat_tables(tables).to_pydict()


def leftovers(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


@pytest.mark.parametrize("kind", ["killed before", "killed after", "disk error"])
@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_a_job_that_dies_anywhere_goes_on(tmp_path, name, kind, kill, monkeypatch):
    monkeypatch.setattr("batchllm.io.output._PART_ROWS", 2)
    clean = tmp_path / "clean"
    run_job(clean / name)
    num_died = 0
    for at in count():
        root = tmp_path / f"{at}"
        root.mkdir()
        path = root / name
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, kind, at)
            try:
                run_job(path)
                died = False
            except (KilledError, OutputError):
                died = True
        kill()
        if name == "out.parquet" and path.exists():
            assert read(path) == WHOLE
        elif died and (path.exists() or list(root.iterdir())):
            check_unfinished(path)
        run_job(path)
        assert read(path) == WHOLE
        assert read_run(path).state == "complete"
        assert leftovers(root) == leftovers(clean)
        num_died += died
        if at >= faults.num_calls:
            break
    assert num_died > 20


def check_unfinished(path):
    """What is on record is on disk, whole; nothing unfinished claims to be complete."""
    try:
        run = read_run(path)
    except OutputError:
        return  # it died before the job was on record
    assert (run.state == "complete") == (run.summary is not None)
    work = path / "_batchllm" if path.is_dir() else path.parent / f".{path.name}.batchllm"
    for answers in run.answers:
        table = pq.read_table(work / answers.file.name, partitioning=None)
        assert table.num_rows == answers.num_rows
        rows = table["__row__"].to_pylist()
        assert table["answer"].to_pylist() == [10 * row for row in rows]
    assert run.num_finished_rows >= sum(answers.num_rows for answers in run.answers)


@pytest.mark.parametrize("kind", ["killed after", "disk error"])
@pytest.mark.parametrize("name", ["out.parquet", "out"])
@pytest.mark.parametrize("how", ["retry", "overwrite"])
def test_another_try_that_dies_anywhere_loses_nothing(tmp_path, name, kind, how, kill, monkeypatch):
    """Failed rows answered again, or everything: until that is done the old output is there."""
    monkeypatch.setattr("batchllm.io.output._PART_ROWS", 2)
    options = {"retry": "error"} if how == "retry" else {"overwrite": True}
    clean = tmp_path / "clean"
    run_job(clean / name)
    num_died = 0
    for at in count():
        path = tmp_path / f"{at}" / name
        run_job(path, failing=[1, 3])
        assert read(path) == HALF
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, kind, at)
            try:
                run_job(path, **options)
                died = False
            except (KilledError, OutputError):
                died = True
        kill()
        if how == "retry" and name == "out.parquet":
            assert read(path) in (HALF, WHOLE)
        run_job(path, **options)
        run_job(path)  # a directory that died as it was deleted is begun anew
        assert read(path) == WHOLE
        assert read_run(path).state == "complete"
        assert leftovers(path.parent) == leftovers(clean)
        num_died += died
        if at >= faults.num_calls:
            break
    assert num_died > 20


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_rows_in_the_journal_outlive_the_process(tmp_path, name, kill):
    store = OutputStore.open(tmp_path / name, SCHEMA, ANSWERS, {}, num_rows=5)
    store.journal(np.array([4, 1]), answers([4, 1]))
    write(store, 1, 4)
    store.journal(np.array([3, 0]), answers([3, 0]))
    store.journal(np.array([2]), answers([2]))
    kill()
    assert read_run(tmp_path / name).num_finished_rows == 5
    again = OutputStore.open(tmp_path / name, SCHEMA, ANSWERS, {}, num_rows=5)
    assert again.journaled.index.tolist() == [0, 2, 3]
    assert again.journaled.table.equals(answers([0, 2, 3]))
    again.close()
    assert OutputStore.open(
        tmp_path / name, SCHEMA, ANSWERS, {}, num_rows=5
    ).journaled.index.tolist() == [0, 2, 3]


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_answers_are_durable_before_they_are_on_record(tmp_path, monkeypatch, name):
    store = OutputStore.open(tmp_path / name, SCHEMA, ANSWERS, {}, num_rows=2)
    faults = Faults(monkeypatch, None, None)
    write(store, 0, 1)
    assert faults.log == ["fsync", "replace", "fsync", "pwrite", "fsync"]
    store.close()


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_an_output_is_durable_before_its_answers_go(tmp_path, monkeypatch, name):
    store = OutputStore.open(tmp_path / name, SCHEMA, ANSWERS, {}, num_rows=5)
    write(store, 0, 1, 2, 3, 4)
    faults = Faults(monkeypatch, None, None)
    store.finish({}, INPUT)
    on_record = [] if name == "out.parquet" else ["pwrite", "fsync"]
    assert faults.log[: 4 + len(on_record)] == ["fsync", "replace", "fsync", *on_record, "unlink"]


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_overwriting_begins_anew_unless_the_same_was_begun(tmp_path, name):
    path = tmp_path / name
    run_job(path, failing=[1])
    begun = OutputStore.open(path, SCHEMA, ANSWERS, {"job": 1}, num_rows=5, retry="error")
    assert begun.finished.tolist() == [True, False, True, True, True]
    begun.close()
    with OutputStore.open(path, SCHEMA, ANSWERS, {"job": 1}, num_rows=5, overwrite=True) as anew:
        if name == "out.parquet":  # whose old file was there, complete
            assert not anew.finished.any()
        write(anew, *[row for row in (0, 1) if not anew.finished[row]])
    again = OutputStore.open(path, SCHEMA, ANSWERS, {"job": 1}, num_rows=5, overwrite=True)
    assert again.finished[[0, 1]].all()
    again.close()
