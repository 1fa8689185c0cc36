"""`verify` calls good what is good, and names whatever is changed."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm.io.answers import AnswerColumns
from batchllm.io.manifest import AnswersRecord, FileRecord, Manifest, read_manifest
from batchllm.io.output import OutputStore
from batchllm.io.parquet import ParquetInput
from batchllm.verify import verify

ROWS = 10
COLUMNS = AnswerColumns("answer", "")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.parquet"
    table = pa.table(
        {
            "id": range(ROWS),
            "x": [float("nan"), *range(1, ROWS)],
            "n": [{"a": [i]} for i in range(ROWS)],
        }
    )
    pq.write_table(table, path, row_group_size=4)
    return path


@pytest.fixture(params=["out.parquet", "out"])
def path(request, tmp_path, monkeypatch):
    monkeypatch.setattr("batchllm.io.output._PART_ROWS", 4)
    return tmp_path / request.param


def answers(rows, failing=()):
    bad = [row in failing for row in rows]
    return pa.table(
        {
            "answer": [None if b else f"answer {row}" for b, row in zip(bad, rows, strict=True)],
            "finish_reason": ["error" if b else "stop" for b in bad],
            "prompt_tokens": [0 if b else 5 for b in bad],
            "cached_tokens": [0] * len(bad),
            "output_tokens": [0 if b else 2 for b in bad],
            "error": ["bad: it is" if b else None for b in bad],
        },
        schema=COLUMNS.schema,
    )


def open_output(path, source):
    read = ParquetInput(source)
    identity = {"input": {"sha256": read.content_hash()}, "output_column": "answer"}
    return OutputStore.open(path, read.schema, COLUMNS.schema, identity, num_rows=ROWS)


def write(path, source, *, finish=True, failing=(3,)):
    with open_output(path, source) as store:
        for rows in ([1, 3, 8], [0, 2, 4, 5, 6, 7, 9]):
            counters = {"failed": len(set(rows) & set(failing))}
            store.write_answers(np.array(rows), answers(rows, failing), counters)
        if finish:
            summary = {"input": str(source), "failed": len(failing)}
            store.finish(summary, ParquetInput(source))


def files(path):
    return [path] if path.is_file() else sorted(path.glob("*.parquet"))


def rewrite(file, change):
    """Another table in the same file, under the same record."""
    table = pq.read_table(file, partitioning=None)
    record = pq.read_metadata(file).metadata[b"batchllm"]
    table = change(table)
    metadata = {**(table.schema.metadata or {}), b"batchllm": record}
    pq.write_table(table.replace_schema_metadata(metadata), file, write_page_checksum=True)


def edit(column, row, value):
    def change(table):
        values = table[column].to_pylist()
        values[row] = value
        at = table.schema.get_field_index(column)
        return table.set_column(
            at, table.schema.field(at), pa.array(values, table.schema.types[at])
        )

    return change


def wrong(path, source=None):
    verdict = verify(path, source)
    assert not verdict.is_good
    text = "; ".join(verdict.wrong)
    assert "WRONG" in verdict.as_text() and "\n" not in text
    assert json.loads(json.dumps(verdict.as_dict()))["wrong"] == verdict.wrong
    return text


def test_what_was_written_is_good(path, source):
    write(path, source)
    verdict = verify(path)
    assert verdict.is_good and not verdict.unchecked
    text = verdict.as_text()
    assert "10 rows with the job's 9 columns" in text
    assert "1 rows have an error and no answer" in text
    assert f"every row of {source} is there, once and in order" in text


def test_an_input_that_went_away_is_not_checked_and_another_is_told(path, source, tmp_path):
    write(path, source)
    moved = source.rename(tmp_path / "moved.parquet")
    verdict = verify(path)
    assert verdict.is_good and "not there any more" in verdict.as_text()
    assert verify(path, moved).is_good and not verify(path, moved).unchecked
    pq.write_table(pa.table({"id": range(ROWS)}), source)
    assert "is not the input that was answered" in wrong(path)
    assert "no such file" in wrong(path, tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edit("answer", 1, "something else"), "their hash is another"),
        (edit("answer", 1, None), "row 1: answer and error do not fit"),
        (edit("error", 0, "bad: no"), "row 0: answer and error do not fit"),
        (edit("finish_reason", 1, None), "row 1: finish_reason and error do not fit"),
        (edit("id", 1, 7), "row 1: id is not the input's"),
        (edit("n", 2, {"a": [0]}), "row 2: n is not the input's"),
        (lambda table: table.slice(1), "9 rows, the job has 10"),
        (lambda table: table.drop_columns("error"), "columns are "),
    ],
)
def test_whatever_was_changed_is_told(tmp_path, source, change, said):
    write(tmp_path / "out.parquet", source)
    rewrite(tmp_path / "out.parquet", change)
    assert said in wrong(tmp_path / "out.parquet")
    write(tmp_path / "out", source)
    rewrite(files(tmp_path / "out")[0], change)
    assert "missing or of another size" in wrong(tmp_path / "out")


def test_a_flipped_bit_is_told_with_its_rows(path, source):
    write(path, source)
    file = files(path)[0]
    chunk = pq.read_metadata(file).row_group(0).column(3)
    content = bytearray(file.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    file.write_bytes(content)
    told = wrong(path)
    assert str(file) in told and "cannot be read" in told


def test_parts_that_went_missing_or_came_are_told(tmp_path, source, monkeypatch):
    monkeypatch.setattr("batchllm.io.output._PART_ROWS", 4)
    path = tmp_path / "out"
    write(path, source)
    first = files(path)[0]
    extra = path / "part-000000000099-000000000100.parquet"
    extra.write_bytes(first.read_bytes())
    assert "is not on record" in wrong(path)
    extra.unlink()
    first.unlink()
    assert f"{first}: missing" in wrong(path)


def test_an_unfinished_output_is_good_as_far_as_it_goes(path, source):
    write(path, source, finish=False)
    verdict = verify(path)
    assert verdict.is_good and "10 of 10 rows" in verdict.as_text()
    work = path.parent / ".out.parquet.batchllm" if path.suffix else path / "_batchllm"
    first, second = sorted(work.glob("answers-*.parquet"))
    rewrite(second, lambda table: table.append_column("y", [range(7)]))
    assert f"{second.name}: missing or not as it was written; its 7 rows" in wrong(path)
    first.unlink()
    assert first.name in wrong(path)


def test_rows_that_are_answered_twice_are_told(path, source):
    write(path, source, finish=False)
    work = path.parent / ".out.parquet.batchllm" if path.suffix else path / "_batchllm"
    first = min(work.glob("answers-*.parquet"))
    copy = work / "answers-000009.parquet"
    copy.write_bytes(first.read_bytes())
    valid = read_manifest(work / "manifest.jsonl").num_valid_bytes
    manifest = Manifest(work / "manifest.jsonl", valid)
    manifest.append_answers(AnswersRecord(FileRecord(copy.name, copy.stat().st_size), 4, 0, {}))
    manifest.close()
    told = wrong(path)
    assert "row 1 is answered 2 times; row 3 is answered 2 times" in told
    assert f"{copy.name}: 3 rows, not 4" in told
