"""A job killed before or after any of its system calls, then run again: same table, nothing left.

The dying call raises a BaseException, which no clean-up code catches, so what is on disk is what a
kill would leave. In a second kind of run the call fails as a disk does, with an OSError.
"""

import os
from itertools import count

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm.errors import OutputError
from batchllm.io.durable import OutputLock
from batchllm.io.inspect import read_run
from batchllm.io.manifest import Manifest
from batchllm.io.output import OutputStore
from batchllm.io.ranges import pending

SCHEMA = pa.schema([("i", pa.int64())])
CALLS = ("fsync", "replace", "pwrite", "ftruncate", "unlink", "rmdir", "mkdir")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No test here depends on the disk having really been waited for."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


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


def run_job(path):
    store = OutputStore.open(path, SCHEMA, {"job": 1}, num_rows=5)
    if store.is_complete:
        return
    for rows in pending(5, store.finished, 2):
        table = pa.table({"i": range(rows.start, rows.end)}, schema=SCHEMA)
        store.write_window(rows, table, {"rows": rows.num_rows})
    store.finish({"rows": 5})


def read(path):
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    return [i for file in files for i in pq.read_table(file, partitioning=None)["i"].to_pylist()]


def leftovers(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


@pytest.mark.parametrize("kind", ["killed before", "killed after", "disk error"])
@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_a_job_that_dies_anywhere_goes_on(tmp_path, name, kind, kill):
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
            assert read(path) == [0, 1, 2, 3, 4]
        elif died and (path.exists() or list(root.iterdir())):
            check_unfinished(path)
        run_job(path)
        assert read(path) == [0, 1, 2, 3, 4]
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
    parts = path if path.is_dir() else path.parent / f".{path.name}.batchllm"
    for window in run.windows:
        rows = pq.read_table(parts / window.file, partitioning=None)["i"].to_pylist()
        assert rows == list(range(window.rows.start, window.rows.end))


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_a_window_is_durable_before_it_is_on_record(tmp_path, monkeypatch, name):
    store = OutputStore.open(tmp_path / name, SCHEMA, {}, num_rows=2)
    faults = Faults(monkeypatch, None, None)
    store.write_window(pending(2, [], 2)[0], pa.table({"i": [0, 1]}, schema=SCHEMA), {})
    assert faults.log == ["fsync", "replace", "fsync", "pwrite", "fsync"]
    store.close()


def test_a_file_is_durable_before_its_parts_go(tmp_path, monkeypatch):
    store = OutputStore.open(tmp_path / "out.parquet", SCHEMA, {}, num_rows=2)
    store.write_window(pending(2, [], 2)[0], pa.table({"i": [0, 1]}, schema=SCHEMA), {})
    faults = Faults(monkeypatch, None, None)
    store.finish({})
    assert faults.log[:4] == ["fsync", "replace", "fsync", "unlink"]
