"""The output store: round trip, refusals, failing disks, the lock."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from tables import InMemory

from batchllm.errors import OutputError
from batchllm.io.durable import OutputLock
from batchllm.io.output import OutputStore
from batchllm.io.parquet import ParquetInput
from batchllm.io.parts import read_record

IDENTITY = {"model": {"sha256": "a" * 64}, "sampling": {"max_tokens": 128}}
SCHEMA = pa.schema([pa.field("i", pa.int64())], metadata={"pandas": "{}", "custom": "kept"})
ANSWERS = pa.schema([pa.field("answer", pa.string())])
INPUT = pa.table({"i": range(10)}, schema=SCHEMA)
ANSWER = pa.table({"answer": [f"answer {i}" for i in range(10)]}, schema=ANSWERS)
TABLE = INPUT.append_column("answer", ANSWER["answer"])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No test here depends on the disk having really been waited for."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(params=["out.parquet", "out"])
def path(request, tmp_path):
    return tmp_path / "deep" / "er" / request.param


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


def test_answers_in_any_order_come_out_in_row_order(path):
    store = complete(path)
    assert store.is_complete
    assert store.summary == {"rows": 10, "speed": 1.5}
    assert read(path).equals(TABLE)


def test_a_file_leaves_nothing_beside_it_and_carries_its_run(tmp_path):
    path = tmp_path / "out.parquet"
    complete(path)
    assert tree(tmp_path) == {"out.parquet"}
    assert pq.read_schema(path).metadata == SCHEMA.metadata
    record = json.loads(pq.read_metadata(path).metadata[b"batchllm"])
    assert record["identity"] == IDENTITY
    assert record["summary"] == {"rows": 10, "speed": 1.5}
    assert record["version"] == 2
    assert pq.read_metadata(path).row_group(0).column(1).compression == "ZSTD"
    assert pq.read_metadata(path).num_row_groups == 1  # four small files became one


def test_a_directory_holds_parts_that_sort_by_row_and_a_summary(tmp_path, monkeypatch):
    monkeypatch.setattr("batchllm.io.output._PART_ROWS", 4)
    path = tmp_path / "out"
    complete(path)
    parts = [
        "part-000000000000-000000000004.parquet",
        "part-000000000004-000000000008.parquet",
        "part-000000000008-000000000010.parquet",
    ]
    assert tree(path) == {*parts, "_batchllm/manifest.jsonl", "_batchllm/summary.json"}
    assert json.loads((path / "_batchllm/summary.json").read_text())["rows"] == 10
    assert read_record(path / parts[1])["identity"] == IDENTITY
    assert read(path).equals(TABLE)
    assert ds.dataset(path).to_table().select(["i", "answer"]).equals(TABLE)
    assert ParquetInput(path).num_rows == 10


def test_every_type_survives_the_store(tmp_path):
    word = pa.array(["a", None, "b"])
    table = pa.table(
        {
            "dictionary": word.dictionary_encode(),
            "large": word.cast(pa.large_string()),
            "stamp": pa.array([1, 2, None], pa.timestamp("ns", "UTC")),
            "decimal": pa.array([1, 2, None], pa.int64()).cast(pa.decimal128(25, 3)),
            "nested": pa.array([{"a": [1], "b": {"c": "x"}}, None, {"a": [], "b": None}]),
            "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int32())),
            "null": pa.nulls(3),
        },
        metadata={"custom": "kept"},
    )
    source = tmp_path / "in.parquet"
    pq.write_table(table, source)
    opened = ParquetInput(source)
    for name in ("out.parquet", "out"):
        with start(tmp_path / name, schema=opened.schema, num_rows=3) as store:
            write(store, 0, 2)
            write(store, 1)
            store.finish({}, opened)
        done = read(tmp_path / name)
        assert done.drop_columns("answer").equals(pq.read_table(source))
        assert done["answer"].to_pylist() == ["answer 0", "answer 1", "answer 2"]
        assert done.schema.metadata[b"custom"] == b"kept"


def test_types_that_parquet_changes_still_fit_the_declared_schema(tmp_path):
    schema = pa.schema([("s", pa.timestamp("s")), ("d", pa.dictionary(pa.int8(), pa.int64()))])
    table = pa.table({"s": [1, 2], "d": pa.array([7, 7]).dictionary_encode()}).cast(schema)
    with start(tmp_path / "out.parquet", schema=SCHEMA, answers=schema, num_rows=2) as store:
        store.write_answers(np.arange(2), table, {})
        finish(store, table=INPUT.slice(0, 2))
    expected = [value.as_py() for value in table["s"]]
    done = read(tmp_path / "out.parquet").to_pydict()
    assert done == {"i": [0, 1], "s": expected, "d": [7, 7]}


def test_an_output_used_as_input_gives_up_its_old_record(tmp_path):
    complete(tmp_path / "one.parquet")
    opened = ParquetInput(tmp_path / "one.parquet")
    stale = opened.schema.with_metadata({**SCHEMA.metadata, b"batchllm": b"{}"})
    second = {"identity": {"second": 1}, "answers": pa.schema([("again", pa.string())])}
    with start(tmp_path / "two.parquet", schema=stale, **second) as store:
        answers = ANSWER.rename_columns(["again"])
        store.write_answers(np.arange(10), answers, {})
        store.finish({}, opened)
    assert read_record(tmp_path / "two.parquet")["identity"] == {"second": 1}
    assert pq.read_schema(tmp_path / "two.parquet").metadata == SCHEMA.metadata
    assert read(tmp_path / "two.parquet").column_names == ["i", "answer", "again"]
    assert start(tmp_path / "two.parquet", schema=opened.schema, **second).is_complete


def test_no_rows_make_an_output_with_columns(path):
    with start(path, num_rows=0) as store:
        assert (len(store.finished), store.is_complete) == (0, False)
        finish(store, table=INPUT.slice(0, 0))
    assert read(path).num_rows == 0
    assert read(path).schema.names == ["i", "answer"]
    assert start(path, num_rows=0).is_complete


def test_a_job_resumes_with_its_counters(path):
    with start(path) as store:
        write(store, 4, 5, 6, 7, 8)
        write(store, 0, 2)
    with start(path) as store:
        assert not store.is_complete
        assert np.flatnonzero(store.finished).tolist() == [0, 2, 4, 5, 6, 7, 8]
        assert store.counters == [{"failed": 1, "steps": 8}, {"failed": 1, "steps": 2}]
        write(store, 1, 9)
    with start(path) as store:
        write(store, 3)
        finish(store)
    assert read(path).equals(TABLE)


def test_a_complete_output_says_so_and_is_left_alone(path):
    complete(path)
    before = {name: (path.parent / name).stat().st_mtime_ns for name in tree(path.parent)}
    store = start(path)
    assert store.is_complete
    assert store.summary == {"rows": 10, "speed": 1.5}
    assert store.finished.all()
    assert {name: (path.parent / name).stat().st_mtime_ns for name in tree(path.parent)} == before
    with pytest.raises(ValueError, match="complete or closed"):
        write(store, 0, 1)
    with pytest.raises(ValueError, match="complete or closed"):
        finish(store)


@pytest.mark.parametrize("finished", [True, False])
def test_a_different_job_is_refused_and_told_what_differs(path, finished):
    if finished:
        complete(path)
    else:
        with start(path) as store:
            write(store, 0, 1)
    other = {"model": {"sha256": "b" * 64}, "sampling": {"max_tokens": 64}}
    message = refused(path, identity=other)
    work = path.parent / ".out.parquet.batchllm"
    to_delete = work if path.suffix and not finished else path
    assert message == (
        f"{path} was started by a different job: model.sha256 differs; sampling.max_tokens is 64,"
        f" was 128. Use another output path, or delete {to_delete} to start over"
    )
    assert "num_rows is 11, was 10" in refused(path, num_rows=11)
    answers = pa.schema([("answer", pa.int64())])
    assert 'columns.answer is "int64", was "string"' in refused(path, answers=answers)
    start(path).close()  # the refusals changed nothing


def test_a_job_that_did_nothing_leaves_nothing_and_refuses_nobody(path):
    start(path).close()
    assert not work_of(path).exists() and not path.exists()
    store = start(path)
    manifest = work_of(path) / "manifest.jsonl"
    header = manifest.read_bytes()
    store.close()
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(header)  # what a process killed before its first answers leaves
    with start(path, identity={"another": "job"}) as store:
        write(store, 0, 1)
    assert "was started by a different job" in refused(path)


def test_answers_that_went_missing_are_given_again(path):
    with start(path) as store:
        write(store, 0, 1, 2, 3)
        write(store, 4, 5)
        write(store, 6, 7)
    lost = work_of(path) / "answers-000001.parquet"
    lost.write_bytes(lost.read_bytes()[:-1])
    with start(path) as store:
        assert np.flatnonzero(store.finished).tolist() == [0, 1, 2, 3, 6, 7]
        assert not lost.exists()
        assert len(store.counters) == 2
        write(store, 4, 5, 8, 9)
    with start(path) as store:
        assert store.finished.all()
        finish(store)
    assert read(path).equals(TABLE)


def test_a_complete_directory_that_lost_a_part_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("batchllm.io.output._PART_ROWS", 4)
    path = tmp_path / "out"
    complete(path)
    part = path / "part-000000000004-000000000008.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    assert refused(path) == (
        f"{part}: is missing or not as it was written; put it back, or delete {path} to start over"
    )
    part.write_bytes(content)
    assert start(path).is_complete


def test_answers_damaged_on_disk_are_found_when_they_are_joined(path):
    schema = pa.schema([("answer", pa.binary())])
    with start(path, answers=schema, num_rows=1) as store:
        # Noise is stored as it is, so that only the page's checksum can tell that it changed.
        table = pa.table({"answer": [os.urandom(10_000)]}, schema=schema)
        store.write_answers(np.array([0]), table, {})
        file = work_of(path) / "answers-000000.parquet"
        content = bytearray(file.read_bytes())
        content[5_000] ^= 1
        file.write_bytes(content)
        with pytest.raises(OutputError, match=r"cannot be read.*; delete that file and run again"):
            finish(store, table=INPUT.slice(0, 1))
    assert not path.is_file() and not list(path.glob("*.parquet"))


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


def work_of(path):
    return path.parent / ".out.parquet.batchllm" if path.suffix else path / "_batchllm"


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
        write(store, *range(10))
        finish(store)
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


def test_joining_holds_a_row_group_and_not_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("batchllm.io.join._GROUP_BYTES", 1_000_000)
    monkeypatch.setattr("batchllm.io.join._BUCKET_ROWS", 8)
    monkeypatch.setattr("batchllm.io.spool._BUDGET_BYTES", 1_000_000)
    schema = pa.schema([("answer", pa.binary())])
    path = tmp_path / "out.parquet"
    source = InMemory(pa.table({"i": range(200)}, schema=SCHEMA))
    order = np.random.default_rng(0).permutation(200).reshape(20, 10)
    sizes = []
    with start(path, answers=schema, num_rows=200) as store:
        for rows in np.sort(order, axis=1):
            table = pa.table({"answer": [bytes([row]) + os.urandom(100_000) for row in rows]})
            store.write_answers(rows, table, {})
        del table
        before = pa.total_allocated_bytes()
        original = pq.ParquetWriter.write_table

        def recording(self, table):
            sizes.append(table.num_rows)
            original(self, table)
            assert pa.total_allocated_bytes() - before < 10_000_000  # of 20 MB

        monkeypatch.setattr(pq.ParquetWriter, "write_table", recording)
        store.finish({}, source)
    assert sum(sizes) == 200
    assert len(sizes) > 5
    assert [answer[0] for answer in pq.read_table(path)["answer"].to_pylist()] == list(range(200))


def test_a_torn_manifest_at_every_byte_never_loses_more_than_its_last_answers(path):
    with start(path) as store:
        for rows in [range(4), range(4, 9), (9,)]:
            write(store, *rows)
    manifest = work_of(path) / "manifest.jsonl"
    whole = manifest.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    file = work_of(path) / "answers-000002.parquet"
    saved = file.read_bytes()
    for length in range(last, len(whole), 5):
        manifest.write_bytes(whole[:length])
        file.write_bytes(saved)
        with start(path) as store:
            assert np.flatnonzero(~store.finished).tolist() == [9]
            assert not file.exists()  # not on record, so not to be trusted
            write(store, 9)
    with start(path) as store:
        finish(store)
    assert read(path).equals(TABLE)


def test_rows_recorded_twice_are_damage(path):
    with start(path) as store:
        write(store, 0, 4)
        store.finished[:] = False
        write(store, 2, 4)
    assert "has rows twice" in refused(path)
