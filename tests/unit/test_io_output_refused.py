"""The output store: refusals, failing disks, the lock."""

import errno
import fcntl
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outputs import ANSWER, TABLE, complete, finish, read, refused, start, tree, work_of, write

from batchllm.errors import OutputError
from batchllm.io.durable import OutputLock
from batchllm.io.output import OutputStore


@pytest.fixture(params=["out.parquet", "out"])
def path(request, tmp_path):
    return tmp_path / "deep" / "er" / request.param


@pytest.mark.parametrize(
    ("rows", "table", "message"),
    [
        ((0, 1, 2), ANSWER.slice(0, 2), "3 rows, the table has 2"),
        ((0, 1), ANSWER.slice(0, 2).rename_columns(["x"]), "declared are"),
        ((0, 1), ANSWER.slice(0, 2).set_column(0, "answer", pa.nulls(2)), "declared are"),
        ((9, 10), ANSWER.slice(0, 2), "only 10 rows|there are 10 rows"),
        ((-1, 3), ANSWER.slice(0, 2), "there are 10 rows"),
        ((3, 5), ANSWER.slice(5, 2), "row 5 answered twice"),
        ((7, 7), ANSWER.slice(5, 2), "not ascending"),
        ((8, 7), ANSWER.slice(5, 2), "not ascending"),
        ((), ANSWER.slice(0, 0), "0 rows"),
    ],
)
def test_answers_that_were_not_declared_are_refused(path, rows, table, message):
    with start(path) as store:
        write(store, 4, 5)
        with pytest.raises(ValueError, match=message):
            store.write_answers(np.array(rows, dtype=np.int64), table, {})
        with pytest.raises(ValueError, match="8 rows unanswered, the first 0"):
            finish(store)
        assert np.flatnonzero(store.finished).tolist() == [4, 5]


def foreign_file(path):
    path.parent.mkdir(parents=True)
    if path.suffix:
        pq.write_table(TABLE, path)
    else:
        path.write_text("notes")


def foreign_directory(path):
    path.mkdir(parents=True)
    (path / "notes.txt").write_text("mine")


def foreign_text(path):
    path.parent.mkdir(parents=True)
    path.write_text("not parquet")


def foreign_work(path):
    work = path.parent / ".out.parquet.batchllm" if path.suffix else path / "_batchllm"
    work.mkdir(parents=True)
    (work / "notes.txt").write_text("mine")


def one_part(path):
    path.parent.mkdir(parents=True)
    complete(path.with_name("other"))
    next(path.with_name("other").glob("part-*")).rename(path)


@pytest.mark.parametrize(
    "stranger", [foreign_file, foreign_directory, foreign_text, foreign_work, one_part]
)
def test_what_is_not_ours_is_left_alone(path, stranger):
    stranger(path)
    before = tree(path.parent)
    with pytest.raises(OutputError) as caught:
        start(path)
    assert str(path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(path.parent) == before


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    complete(tmp_path / "out")
    assert read(tmp_path / "out").equals(TABLE)


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "out.parquet"
    with start(path) as store:
        write(store, *range(10))
        path.write_text("precious")
        with pytest.raises(OutputError, match="appeared while the job ran"):
            finish(store)
    assert path.read_text() == "precious"


def test_an_output_behind_a_link_is_written_where_it_points(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "out.parquet").symlink_to(tmp_path / "far" / "real.parquet")
    complete(tmp_path / "out.parquet")
    assert tree(tmp_path / "far") == {"real.parquet"}
    assert (tmp_path / "out.parquet").is_symlink()


def test_a_full_disk_costs_the_answers_in_hand_and_nothing_else(path):
    with start(path) as store:
        write(store, 0, 1, 2, 3)
        full = work_of(path) / "answers-000001.parquet.tmp"
        full.symlink_to("/dev/full")
        with pytest.raises(OutputError) as caught:
            write(store, 4, 5)
        assert str(caught.value) == f"{path}: cannot be written: No space left on device"
        assert not full.is_symlink()
        assert np.flatnonzero(store.finished).tolist() == [0, 1, 2, 3]
        write(store, *range(4, 10))  # there is space again
        finish(store)
    assert read(path).equals(TABLE)


def test_a_full_disk_at_the_end_leaves_no_file_that_looks_finished(tmp_path):
    path = tmp_path / "out.parquet"
    with start(path) as store:
        write(store, *range(10))
        (work_of(path) / "output.tmp").symlink_to("/dev/full")
        with pytest.raises(OutputError, match="No space left on device"):
            finish(store)
        assert not path.exists()
        assert not store.is_complete
    with start(path) as store:
        assert store.finished.all()
        finish(store)
    assert read(path).equals(TABLE)


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "replace"])
def test_a_place_that_cannot_be_written_is_told_in_one_line(path, monkeypatch, call, reason):
    path.parent.mkdir(parents=True)

    def fail(*args, **kwargs):
        raise OSError(reason, "inner words", str(path))

    monkeypatch.setattr(os, call, fail)
    assert refused(path) == f"{path}: cannot be written: {os.strerror(reason)}"
    monkeypatch.undo()
    assert list(path.parent.iterdir()) == []
    complete(path)


def test_a_parent_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("out.parquet", "out"):
        assert "Not a directory" in refused(tmp_path / "file" / name)


def test_a_second_writer_is_refused_at_once(path):
    with start(path) as store:
        assert "another process is writing it" in refused(path)
        with pytest.raises(OutputError, match="another process is writing it"):
            OutputStore.refuse_busy(path)
        write(store, *range(10))
        finish(store)
    OutputStore.refuse_busy(path)
    assert start(path).is_complete


def test_a_job_that_another_process_finished_just_now_is_complete(path, monkeypatch):
    acquire = OutputLock.acquire

    def finish_first(*args):
        monkeypatch.setattr(OutputLock, "acquire", acquire)
        complete(path)
        return acquire(*args)

    monkeypatch.setattr(OutputLock, "acquire", finish_first)
    store = start(path)
    assert store.is_complete
    with pytest.raises(ValueError, match="complete or closed"):
        finish(store)
    assert read(path).equals(TABLE)


def test_the_lock_falls_with_its_process(path):
    with start(path) as store:
        write(store, 0, 1)
    lock = work_of(path) / "lock"
    code = "import fcntl,sys; f=open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=1)"
    code += "; sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout.readline() == b"1\n"
        assert "another process is writing it" in refused(path)
        holder.kill()
    start(path).close()


def test_a_lock_whose_file_was_deleted_by_its_last_holder_is_taken_anew(path, monkeypatch):
    start(path).close()
    lock = work_of(path) / "lock"
    flock = fcntl.flock

    def delete_first(handle, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        lock.unlink()
        return flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    with start(path):
        assert lock.exists()
        assert "another process is writing it" in refused(path)


def test_a_file_system_without_locks_is_used_without(path, monkeypatch):
    def fail(handle, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", fail)
    complete(path)
