"""The manifest: what was appended is what is read, torn tails fall off, other damage is told."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm.errors import OutputError
from batchllm.io.identity import describe_differences, plain
from batchllm.io.manifest import (
    AnswersRecord,
    FileRecord,
    FinishedRecord,
    Job,
    Manifest,
    read_manifest,
)

JOB = Job({"model": {"sha256": "ab" * 32}, "prompt": "a\nb\r\u2028é"}, 100, {"t": "string"})


def answers(number, num_rows, **counters):
    file = FileRecord(f"answers-{number}", 1000 + number)
    return AnswersRecord(file, num_rows, counters.get("failed", 0), counters)


ANSWERS = [answers(0, 10, steps=3), answers(1, 10, failed=2), answers(2, 20)]
FINISHED = FinishedRecord({"rows": 100}, [FileRecord("part-0", 5000)], "cd" * 32)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "manifest.jsonl"
    manifest = Manifest.create(path, JOB)
    for record in ANSWERS:
        manifest.append_answers(record)
    manifest.append_finished(FINISHED)
    manifest.close()
    return path


def test_what_was_written_is_read(path):
    state = read_manifest(path)
    assert state.job == JOB
    assert state.answers == ANSWERS
    assert state.finished == FINISHED
    assert state.num_valid_bytes == path.stat().st_size
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["data"]["type"] for line in lines] == ["job", *["answers"] * 3, "finished"]
    assert lines[2]["data"]["failed"] == 2
    assert lines[2]["data"]["rows"] == 10


def test_answers_take_the_place_of_others_and_reopening_drops_all(path):
    manifest = Manifest(path, read_manifest(path).num_valid_bytes)
    kept = answers(3, 90)
    manifest.append_reopened(kept)
    assert (read_manifest(path).answers, read_manifest(path).finished) == ([kept], None)
    better = [answers(4, 5), answers(5, 80)]
    manifest.append_answers(better[0])
    manifest.append_answers(better[1], replaces=kept.file.name)
    manifest.close()
    state = read_manifest(path)
    assert state.answers == better
    assert state.next_number == 6


def test_a_manifest_can_begin_with_answers(tmp_path):
    path = tmp_path / "manifest.jsonl"
    Manifest.create(path, JOB, ANSWERS[:1]).close()
    assert read_manifest(path).answers == ANSWERS[:1]


def test_no_manifest_is_none(tmp_path):
    assert read_manifest(tmp_path / "manifest.jsonl") is None


def test_a_cut_at_any_byte_keeps_the_whole_lines_and_can_be_appended_to(path):
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    for length in sorted({*range(0, header, 9), *range(header, len(whole), 2), len(whole)}):
        path.write_bytes(whole[:length])
        if length < header:
            with pytest.raises(OutputError, match="line 1 is damaged"):
                read_manifest(path)
            continue
        state = read_manifest(path)
        num_lines = whole[:length].count(b"\n")
        assert state.answers == ANSWERS[: num_lines - 1]
        assert (state.finished is None) == (length < len(whole))
        manifest = Manifest(path, state.num_valid_bytes)
        manifest.append_answers(answers(50, 10))
        manifest.close()
        again = read_manifest(path)
        assert again.answers[-1] == answers(50, 10)
        assert len(again.answers) == len(state.answers) + 1
        assert again.num_valid_bytes == path.stat().st_size


def test_a_tail_of_zeros_is_dropped(path):
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 50)
    assert read_manifest(path).num_valid_bytes == len(whole)


def test_any_changed_byte_before_the_last_line_is_damage(path):
    whole = path.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for at in range(0, last - 1, 3):
        damaged = bytearray(whole)
        damaged[at] ^= 0x11
        path.write_bytes(damaged)
        with pytest.raises(OutputError, match=r"manifest\.jsonl: line \d is damaged; delete"):
            read_manifest(path)


def test_a_line_that_is_whole_but_not_ours_is_refused(path, monkeypatch):
    manifest = Manifest(path, path.stat().st_size)
    manifest._append({"type": "else"})
    manifest.close()
    with pytest.raises(OutputError, match="line 6 is not a batchllm manifest's"):
        read_manifest(path)
    monkeypatch.setattr("batchllm.io.manifest.FORMAT_VERSION", 9)
    with pytest.raises(OutputError, match="has format 3 of another batchllm, this one writes 9"):
        read_manifest(path)


@pytest.mark.parametrize("step", ["pwrite", "fsync"])
def test_a_line_that_fails_is_taken_back(path, monkeypatch, step):
    before = path.read_bytes()
    manifest = Manifest(path, len(before))
    pwrite = os.pwrite

    def fail(*args):
        if step == "pwrite":
            pwrite(args[0], args[1][:7], args[2])
        raise OSError(28, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="full"):
            manifest.append_answers(answers(50, 10))
    assert path.read_bytes() == before
    manifest.append_answers(answers(60, 10))
    assert read_manifest(path).answers == [*ANSWERS, answers(60, 10)]
    manifest.close()


def test_half_a_line_that_cannot_be_taken_back_is_written_over(path, monkeypatch):
    manifest = Manifest(path, path.stat().st_size)
    pwrite = os.pwrite

    def fail(*args):
        if len(args) == 3:
            pwrite(args[0], args[1][:-9], args[2])
        raise OSError(5, "disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(OSError, match="disk"):
            manifest.append_answers(answers(50, 10, much="x" * 300))
    manifest.append_answers(answers(60, 10))
    manifest.close()
    assert read_manifest(path).answers == [*ANSWERS, answers(60, 10)]


def test_short_writes_are_continued(path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: pwrite(handle, data[:5], at))
    manifest = Manifest(path, path.stat().st_size)
    manifest.append_answers(answers(50, 10))
    manifest.close()
    assert read_manifest(path).answers == [*ANSWERS, answers(50, 10)]


def test_differences_are_named_by_path_with_both_values():
    stored = {"sampling": {"max_tokens": 128, "seed": 0}, "model": {"sha256": "a" * 64}, "old": 1}
    current = {"sampling": {"max_tokens": 64, "seed": 0}, "model": {"sha256": "b" * 64}, "new": "é"}
    assert describe_differences(stored, current) == (
        'sampling.max_tokens is 64, was 128; model.sha256 differs; new is "é", was not set;'
        " old is not set, was 1"
    )
    assert describe_differences({"a": {"b": 1}}, {"a": 2}) == 'a is 2, was {"b": 1}'
    assert describe_differences({}, {str(i): i for i in range(7)}).endswith("; and 2 more")


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.lists(inner),
    max_leaves=8,
)
identities = st.dictionaries(st.text(max_size=3), nested, max_size=3)


@given(identities, identities)
def test_there_are_differences_just_when_the_identities_differ(one, other):
    assert (describe_differences(plain(one), plain(other)) == "") == (one == other)


def test_plain_gives_what_json_gives_back():
    assert plain({"a": (1, 2), "b": float("nan"), "c": 0.1}) == {"a": [1, 2], "b": None, "c": 0.1}
    with pytest.raises(TypeError):
        plain({"a": object()})
