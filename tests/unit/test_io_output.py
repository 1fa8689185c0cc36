"""The output store: round trip, refusals, failing disks, the lock."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchllm.errors import OutputError
from batchllm.io.durable import OutputLock
from batchllm.io.output import OutputStore
from batchllm.io.parquet import ParquetInput
from batchllm.io.parts import read_record
from batchllm.io.ranges import RowRange, pending

IDENTITY = {"model": {"sha256": "a" * 64}, "sampling": {"max_tokens": 128}}
SCHEMA = pa.schema(
    [pa.field("i", pa.int64()), pa.field("answer", pa.string())],
    metadata={"pandas": "{}", "custom": "kept"},
)
TABLE = pa.table({"i": range(10), "answer": [f"answer {i}" for i in range(10)]}, schema=SCHEMA)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No test here depends on the disk having really been waited for."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(params=["out.parquet", "out"])
def path(request, tmp_path):
    return tmp_path / "deep" / "er" / request.param


def start(path, identity=IDENTITY, schema=SCHEMA, num_rows=10):
    return OutputStore.open(path, schema, identity, num_rows=num_rows)


def write(store, start, end):
    rows = RowRange(start, end)
    store.write_window(rows, TABLE.slice(start, end - start), {"failed": 1, "steps": end})


def complete(path):
    with start(path) as store:
        for bounds in [(4, 9), (0, 4), (9, 10)]:
            write(store, *bounds)
        store.finish({"rows": 10, "speed": 1.5})
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


def test_windows_in_any_order_come_out_in_row_order(path):
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
    assert record["version"] == 1
    assert pq.read_metadata(path).row_group(0).column(1).compression == "ZSTD"
    assert pq.read_metadata(path).num_row_groups == 1  # three small windows became one


def test_a_directory_holds_parts_that_sort_by_row_and_a_summary(tmp_path):
    path = tmp_path / "out"
    complete(path)
    parts = [
        "part-000000000000-000000000004.parquet",
        "part-000000000004-000000000009.parquet",
        "part-000000000009-000000000010.parquet",
    ]
    assert tree(path) == {*parts, "_batchllm/manifest.jsonl", "_batchllm/summary.json"}
    assert json.loads((path / "_batchllm/summary.json").read_text())["rows"] == 10
    record = read_record(path / parts[1])
    assert (record["identity"], record["rows"]) == (IDENTITY, [4, 9])
    assert record["counters"] == {"failed": 1, "steps": 9}
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
            for window in opened.windows(pending(3, [], 1)):
                store.write_window(window.rows, window.table, {})
            store.finish({})
        assert read(tmp_path / name).equals(pq.read_table(source))
        assert read(tmp_path / name).schema.metadata[b"custom"] == b"kept"


def test_types_that_parquet_changes_still_fit_the_declared_schema(tmp_path):
    schema = pa.schema([("s", pa.timestamp("s")), ("d", pa.dictionary(pa.int8(), pa.int64()))])
    table = pa.table({"s": [1, 2], "d": pa.array([7, 7]).dictionary_encode()}).cast(schema)
    with start(tmp_path / "out.parquet", schema=schema, num_rows=2) as store:
        store.write_window(RowRange(0, 2), table, {})
        store.finish({})
    expected = [value.as_py() for value in table["s"]]
    assert read(tmp_path / "out.parquet").to_pydict() == {"s": expected, "d": [7, 7]}


def test_an_output_used_as_input_gives_up_its_old_record(tmp_path):
    complete(tmp_path / "one.parquet")
    opened = ParquetInput(tmp_path / "one.parquet")
    stale = opened.schema.with_metadata({**SCHEMA.metadata, b"batchllm": b"{}"})
    with start(tmp_path / "two.parquet", {"second": 1}, stale) as store:
        for window in opened.windows([RowRange(0, 10)]):
            store.write_window(window.rows, window.table, {})
        store.finish({})
    assert read_record(tmp_path / "two.parquet")["identity"] == {"second": 1}
    assert pq.read_schema(tmp_path / "two.parquet").metadata == SCHEMA.metadata
    assert start(tmp_path / "two.parquet", {"second": 1}, opened.schema).is_complete


def test_no_rows_make_an_output_with_columns(path):
    with start(path, num_rows=0) as store:
        assert (store.finished, store.is_complete) == ([], False)
        store.finish({})
    assert read(path).num_rows == 0
    assert read(path).schema.names == ["i", "answer"]
    assert start(path, num_rows=0).is_complete


def test_a_job_resumes_with_its_counters_and_another_window_size(path):
    with start(path) as store:
        write(store, 4, 9)
        write(store, 0, 2)
    with start(path) as store:
        assert not store.is_complete
        assert store.finished == [RowRange(0, 2), RowRange(4, 9)]
        assert store.window_counters == [{"failed": 1, "steps": 2}, {"failed": 1, "steps": 9}]
        for rows in pending(10, store.finished, 1):
            write(store, rows.start, rows.end)
        store.finish({})
    assert read(path).equals(TABLE)


def test_a_complete_output_says_so_and_is_left_alone(path):
    complete(path)
    before = {name: (path.parent / name).stat().st_mtime_ns for name in tree(path.parent)}
    store = start(path)
    assert store.is_complete
    assert store.summary == {"rows": 10, "speed": 1.5}
    assert sum(rows.num_rows for rows in store.finished) == 10
    assert {name: (path.parent / name).stat().st_mtime_ns for name in tree(path.parent)} == before
    with pytest.raises(ValueError, match="complete or closed"):
        write(store, 0, 1)
    with pytest.raises(ValueError, match="complete or closed"):
        store.finish({})


@pytest.mark.parametrize("finished", [True, False])
def test_a_different_job_is_refused_and_told_what_differs(path, finished):
    if finished:
        complete(path)
    else:
        with start(path) as store:
            write(store, 0, 4)
    other = {"model": {"sha256": "b" * 64}, "sampling": {"max_tokens": 64}}
    message = refused(path, identity=other)
    work = path.parent / ".out.parquet.batchllm"
    to_delete = work if path.suffix and not finished else path
    assert message == (
        f"{path} was started by a different job: model.sha256 differs; sampling.max_tokens is 64,"
        f" was 128. Use another output path, or delete {to_delete} to start over"
    )
    assert "num_rows is 11, was 10" in refused(path, num_rows=11)
    schema = SCHEMA.set(1, pa.field("answer", pa.int64()))
    assert 'columns.answer is "int64", was "string"' in refused(path, schema=schema)
    start(path).close()  # the refusals changed nothing


def test_a_job_that_did_nothing_leaves_nothing_and_refuses_nobody(path):
    start(path).close()
    assert not work_of(path).exists() and not path.exists()
    store = start(path)
    manifest = work_of(path) / "manifest.jsonl"
    header = manifest.read_bytes()
    store.close()
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(header)  # what a process killed before its first window leaves
    with start(path, identity={"another": "job"}) as store:
        write(store, 0, 4)
    assert "was started by a different job" in refused(path)


def test_a_part_that_went_missing_is_done_again(tmp_path):
    path = tmp_path / "out"
    complete(path)
    part = path / "part-000000000004-000000000009.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    with start(path) as store:
        assert not store.is_complete
        assert store.finished == [RowRange(0, 4), RowRange(9, 10)]
        assert not (path / "_batchllm/summary.json").exists()
        write(store, 4, 7)
        write(store, 7, 9)
        store.finish({})
    assert read(path).equals(TABLE)
    assert start(path).is_complete


def test_a_part_damaged_on_disk_is_found_when_the_file_is_joined(tmp_path):
    path = tmp_path / "out.parquet"
    schema = pa.schema([("t", pa.binary())])
    with start(path, schema=schema, num_rows=1) as store:
        # Noise is stored as it is, so that only the page's checksum can tell that it changed.
        table = pa.table({"t": [os.urandom(10_000)]}, schema=schema)
        store.write_window(RowRange(0, 1), table, {})
        part = tmp_path / ".out.parquet.batchllm/part-000000000000-000000000001.parquet"
        content = bytearray(part.read_bytes())
        content[5_000] ^= 1
        part.write_bytes(content)
        with pytest.raises(OutputError, match=r"cannot be read.*; delete that part and run again"):
            store.finish({})
    assert not path.exists()


@pytest.mark.parametrize(
    ("rows", "table", "message"),
    [
        ((0, 3), TABLE.slice(0, 2), "3 rows, the table has 2"),
        ((0, 2), TABLE.slice(0, 2).rename_columns(["i", "x"]), "declared are"),
        ((0, 2), TABLE.slice(0, 2).set_column(1, "answer", pa.nulls(2)), "declared are"),
        ((9, 11), TABLE.slice(0, 2), "only 10 rows"),
        ((5, 7), TABLE.slice(5, 2), "written twice"),
        ((3, 3), TABLE.slice(0, 0), "0 rows"),
    ],
)
def test_a_window_that_was_not_declared_is_refused(path, rows, table, message):
    with start(path) as store:
        write(store, 4, 6)
        with pytest.raises(ValueError, match=message):
            store.write_window(RowRange(*rows), table, {})
        with pytest.raises(ValueError, match="2 gaps, the first rows 0 to 3"):
            store.finish({})
        assert store.finished == [RowRange(4, 6)]


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
    with start(path.with_name("other")) as store:
        write(store, 0, 4)
    path.with_name("other").joinpath("part-000000000000-000000000004.parquet").rename(path)


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
        write(store, 0, 10)
        path.write_text("precious")
        with pytest.raises(OutputError, match="appeared while the job ran"):
            store.finish({})
    assert path.read_text() == "precious"


def test_an_output_behind_a_link_is_written_where_it_points(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "out.parquet").symlink_to(tmp_path / "far" / "real.parquet")
    complete(tmp_path / "out.parquet")
    assert tree(tmp_path / "far") == {"real.parquet"}
    assert (tmp_path / "out.parquet").is_symlink()


def work_of(path):
    return path.parent / ".out.parquet.batchllm" if path.suffix else path / "_batchllm"


def test_a_full_disk_costs_the_window_and_nothing_else(path):
    with start(path) as store:
        write(store, 0, 4)
        full = work_of(path) / "part-000000000004-000000000009.parquet.tmp"
        full.symlink_to("/dev/full")
        with pytest.raises(OutputError) as caught:
            write(store, 4, 9)
        assert str(caught.value) == f"{path}: cannot be written: No space left on device"
        assert not full.is_symlink()
        assert store.finished == [RowRange(0, 4)]
        write(store, 4, 9)  # there is space again
        write(store, 9, 10)
        store.finish({})
    assert read(path).equals(TABLE)


def test_a_full_disk_at_the_end_leaves_no_file_that_looks_finished(tmp_path):
    path = tmp_path / "out.parquet"
    with start(path) as store:
        write(store, 0, 10)
        (work_of(path) / "output.tmp").symlink_to("/dev/full")
        with pytest.raises(OutputError, match="No space left on device"):
            store.finish({})
        assert not path.exists()
        assert not store.is_complete
    with start(path) as store:
        assert store.finished == [RowRange(0, 10)]
        store.finish({})
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
        write(store, 0, 10)
        store.finish({})
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
        store.finish({})
    assert read(path).equals(TABLE)


def test_the_lock_falls_with_its_process(path):
    with start(path) as store:
        write(store, 0, 4)
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
    monkeypatch.setattr("batchllm.io.parts._GROUP_BYTES", 1_000_000)
    schema = pa.schema([("t", pa.binary())])
    path = tmp_path / "out.parquet"
    sizes = []
    with start(path, schema=schema, num_rows=200) as store:
        for rows in pending(200, [], 20):
            table = pa.table({"t": [os.urandom(100_000) for _ in range(rows.num_rows)]})
            store.write_window(rows, table, {})
        del table
        before = pa.total_allocated_bytes()
        original = pq.ParquetWriter.write_table

        def recording(self, table):
            sizes.append(table.num_rows)
            original(self, table)
            assert pa.total_allocated_bytes() - before < 10_000_000  # of 20 MB

        monkeypatch.setattr(pq.ParquetWriter, "write_table", recording)
        store.finish({})
    assert sum(sizes) == 200
    assert len(sizes) > 5


def test_a_torn_manifest_at_every_byte_never_loses_more_than_its_last_window(path):
    with start(path) as store:
        for bounds in [(0, 4), (4, 9), (9, 10)]:
            write(store, *bounds)
    manifest = work_of(path) / "manifest.jsonl"
    whole = manifest.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    part = (path if path.is_dir() else manifest.parent) / "part-000000000009-000000000010.parquet"
    saved = part.read_bytes()
    for length in range(last, len(whole), 5):
        manifest.write_bytes(whole[:length])
        part.write_bytes(saved)
        with start(path) as store:
            assert store.finished == [RowRange(0, 4), RowRange(4, 9)]
            assert not part.exists()  # not on record, so not to be trusted
            write(store, 9, 10)
    with start(path) as store:
        store.finish({})
    assert read(path).equals(TABLE)


def test_rows_recorded_twice_are_damage(tmp_path):
    path = tmp_path / "out"
    with start(path) as store:
        write(store, 0, 4)
        store._windows.clear()
        write(store, 2, 6)
    assert "has rows twice" in refused(path)
