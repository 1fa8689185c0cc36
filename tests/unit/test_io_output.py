"""The output store: round trip, resuming, damage."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from outputs import (
    ANSWER,
    IDENTITY,
    INPUT,
    SCHEMA,
    TABLE,
    complete,
    finish,
    read,
    refused,
    start,
    tree,
    work_of,
    write,
)
from tables import InMemory

from batchllm.errors import OutputError
from batchllm.io.parquet import ParquetInput
from batchllm.io.parts import read_record


@pytest.fixture(params=["out.parquet", "out"])
def path(request, tmp_path):
    return tmp_path / "deep" / "er" / request.param


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
    assert record["version"] == 3
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
        " was 128. Use another output path, or start over with --overwrite, which deletes "
        f"{to_delete}"
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
