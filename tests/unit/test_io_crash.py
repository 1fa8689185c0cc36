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
from batchllm.io.manifest import Manifest
from batchllm.io.output import OutputStore

SCHEMA = pa.schema([("i", pa.int64())])
ANSWERS = pa.schema([("answer", pa.int64())])
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
    for kind, name in ((OutputLock, "release"), (Manifest, "close")):

        def init(self, *args, original=kind.__init__, closer=name):
            original(self, *args)
            opened.append(getattr(self, closer))

        monkeypatch.setattr(kind, "__init__", init)

    def close_all():
        while opened:
            opened.pop()()

    return close_all


def write(store, *rows):
    table = pa.table({"answer": [10 * row for row in rows]}, schema=ANSWERS)
    store.write_answers(np.array(rows), table, {"rows": len(rows)})


def run_job(path):
    store = OutputStore.open(path, SCHEMA, ANSWERS, {"job": 1}, num_rows=5)
    if store.is_complete:
        return
    for rows in ([0, 3], [1, 4], [2]):
        if left := [row for row in rows if not store.finished[row]]:
            write(store, *left)
    store.finish({"rows": 5}, INPUT)


WHOLE = {"i": [0, 1, 2, 3, 4], "answer": [0, 10, 20, 30, 40]}


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
        assert table["answer"].to_pylist() == [10 * row for row in table["__row__"].to_pylist()]


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
