"""Rows that fail, jobs that are told to stop: what is kept, what is said, what goes on."""

import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import invoke

from batchllm import job as jobs
from batchllm.io.inspect import read_run
from batchllm.request import RequestOutput

ROWS, LONG = 12, 300


@pytest.fixture
def source(tmp_path):
    """Every fourth row is bad."""
    path = tmp_path / "in.parquet"
    texts = [None if i % 4 == 1 else f"row {i}" for i in range(ROWS)]
    pq.write_table(pa.table({"text": texts}), path)
    return path


def run(source, output, *extra):
    words = ("--model", "fake", "--prompt-column", "text", "--max-tokens", 4, "--kv-memory", "1M")
    return invoke("run", source, output, *words, "--quiet", *extra)


def errors(path):
    return [i for i, e in enumerate(pq.read_table(path)["error"].to_pylist()) if e is not None]


@pytest.mark.parametrize(
    ("limit", "code"), [("3", 0), ("2", 3), ("0", 3), ("25%", 0), ("24.9%", 3), ("100%", 0)]
)
def test_how_many_rows_may_fail(source, tmp_path, limit, code):
    result = run(source, tmp_path / "o.parquet", "--max-errors", limit)
    assert result.exit_code == code, result.stderr
    assert errors(tmp_path / "o.parquet") == [1, 5, 9]
    if code:
        assert f"3 rows failed, --max-errors is {limit}" in result.stderr


@pytest.mark.parametrize("limit", ["-1", "101%", "many", "1.5", "nan%", ""])
def test_a_limit_that_is_none_is_refused(source, tmp_path, limit):
    result = run(source, tmp_path / "o.parquet", f"--max-errors={limit}")
    assert result.exit_code == 2
    assert "it must be a number of rows" in result.stderr


def test_on_error_stop_stops_at_the_limit_and_says_how_to_go_on(source, tmp_path):
    output = tmp_path / "o.parquet"
    words = ("--window-rows", 4, "--on-error", "stop", "--max-errors", 1)
    stopped = run(source, output, *words)
    assert stopped.exit_code == 3
    assert " rows failed; " in stopped.stderr and "goes on with" in stopped.stderr
    state = read_run(output)
    assert state.state == "unfinished" and state.num_finished_rows < ROWS
    again = run(source, output, *words)  # nothing has changed
    assert again.exit_code == 3
    assert read_run(output).num_finished_rows == state.num_finished_rows
    assert run(source, output).exit_code == 0
    assert errors(output) == [1, 5, 9]
    assert run(source, tmp_path / "none.parquet", "--on-error", "stop").exit_code == 3
    assert run(source, tmp_path / "x.parquet", "--on-error", "maybe").exit_code == 2


@pytest.mark.parametrize("name", ["o.parquet", "o"])
def test_failed_rows_are_answered_again_and_the_others_kept(source, tmp_path, name, monkeypatch):
    whole, output = tmp_path / "whole.parquet", tmp_path / name
    assert run(source, whole).exit_code == 0
    build = jobs.AnswerColumns.table

    def some_fail(columns, outputs):
        return build(columns, [failed(o) if o.row_index in (3, 8) else o for o in outputs])

    monkeypatch.setattr(jobs.AnswerColumns, "table", some_fail)
    monkeypatch.setattr(jobs.Metrics, "as_dict", lambda metrics: {"rows": ROWS, "failed": 5})
    assert run(source, output).exit_code == 0
    monkeypatch.undo()
    assert errors(output) == [1, 3, 5, 8, 9]
    assert run(source, output).exit_code == 0  # complete: nothing is done
    assert errors(output) == [1, 3, 5, 8, 9]
    assert run(source, output, "--retry-failed").exit_code == 0
    assert errors(output) == [1, 5, 9]
    columns = ["text", "answer", "finish_reason", "error"]
    assert pq.read_table(output, columns=columns).equals(pq.read_table(whole, columns=columns))
    summary = read_run(output).summary
    assert (summary["rows"], summary["failed"]) == (ROWS, 3)


def failed(output):
    return RequestOutput(
        row_index=output.row_index,
        text=None,
        output_token_ids=output.output_token_ids[:0],
        finish_reason="error",
        prompt_tokens=0,
        cached_tokens=0,
        error="broken: by a test",
    )


@pytest.mark.parametrize("name", ["o.parquet", "o"])
def test_only_what_is_ours_is_overwritten(source, tmp_path, name):
    output = tmp_path / name
    assert run(source, output).exit_code == 0
    other = run(source, output, "--seed", 7)
    assert other.exit_code == 1 and "--overwrite" in other.stderr
    assert run(source, output, "--seed", 7, "--overwrite").exit_code == 0
    assert read_run(output).identity["sampling"]["seed"] == 7
    theirs = tmp_path / f"theirs-{name}"
    if name == "o":
        theirs.mkdir()
        pq.write_table(pa.table({"a": [1]}), theirs / "a.parquet")
    else:
        pq.write_table(pa.table({"a": [1]}), theirs)
    refused = run(source, theirs, "--overwrite")
    assert refused.exit_code == 1 and "\n" not in refused.stderr.strip()
    assert pq.read_table(theirs).to_pydict() == {"a": [1]}


LONG_OPTIONS = ("--prompt-column", "text", "--max-tokens", 40, "--ignore-eos")


def write_long(folder):
    table = pa.table({"text": [f"{i % 40} is the number of row {i}" for i in range(LONG)]})
    pq.write_table(table, folder / "in.parquet")
    return folder / "in.parquet"


@pytest.fixture
def long_job(tmp_path):
    """A command for some seconds of work."""
    words = [sys.executable, "-m", "batchllm.cli", "run", write_long(tmp_path)]
    words += [tmp_path / "o.parquet", "--model", "fake", *LONG_OPTIONS]
    return [str(word) for word in [*words, "--max-num-seqs", 4, "--kv-memory", "4M"]]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What it answers, left alone."""
    folder = tmp_path_factory.mktemp("whole")
    output = folder / "o.parquet"
    result = invoke("run", write_long(folder), output, "--model", "fake", *LONG_OPTIONS, "--quiet")
    assert result.exit_code == 0
    return pq.read_table(output).drop_columns("cached_tokens")


def start_and_wait_for_answers(words, tmp_path):
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, preexec_fn=listen_to_signals
    )
    journal = tmp_path / ".o.parquet.batchllm" / "journal"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.02)
    return process


def listen_to_signals():
    """A shell's background jobs, these tests perhaps among them, ignore some."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_writes_what_is_done(long_job, tmp_path, number, expected):
    with start_and_wait_for_answers(long_job, tmp_path) as process:
        process.send_signal(number)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130, stderr
    assert "stopping after this step" in stderr and "the same command goes on" in stderr
    assert "Traceback" not in stderr
    state = read_run(tmp_path / "o.parquet")
    assert 0 < state.num_finished_rows < LONG
    assert sum(answers.num_rows for answers in state.answers) == state.num_finished_rows
    finish_and_compare(long_job, tmp_path, expected)


@pytest.mark.parametrize("how", ["twice", "kill"])
def test_what_was_finished_before_a_sudden_end_is_not_done_again(long_job, tmp_path, how, expected):
    with start_and_wait_for_answers(long_job, tmp_path) as process:
        if how == "kill":
            process.kill()
        else:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.002)
            process.send_signal(signal.SIGTERM)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == (-signal.SIGKILL if how == "kill" else 130), stderr
    assert read_run(tmp_path / "o.parquet").num_finished_rows > 0
    finish_and_compare(long_job, tmp_path, expected)


def finish_and_compare(words, tmp_path, expected):
    finished = read_run(tmp_path / "o.parquet").num_finished_rows
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"going on after {finished:,} rows" in again.stderr
    assert pq.read_table(tmp_path / "o.parquet").drop_columns("cached_tokens").equals(expected)


CRASHING = """
import os, signal, sys
import numpy as np
from batchllm.runner.hash_runner import HashRunner
execute = HashRunner.execute
deadly = int(sys.argv.pop(1))
def crash(runner, batch):
    if deadly in batch.samples.row_index:
        os.kill(os.getpid(), signal.SIGSEGV)
    return execute(runner, batch)
HashRunner.execute = crash
from batchllm.cli import main
main()
"""


def test_a_row_that_crashes_the_process_twice_is_set_aside(tmp_path):
    source, output = tmp_path / "in.parquet", tmp_path / "o.parquet"
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(20)]}), source)
    whole = tmp_path / "whole.parquet"
    assert run(source, whole).exit_code == 0
    words = [sys.executable, "-c", CRASHING, "13", "run", source, output, "--model", "fake"]
    words += ["--prompt-column", "text", "--max-tokens", "4", "--kv-memory", "1M"]
    words += ["--max-num-seqs", "4"]
    ends = [
        subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
        for _ in range(3)
    ]
    assert [end.returncode for end in ends] == [-signal.SIGSEGV, -signal.SIGSEGV, 0]
    assert "died (Segmentation fault) with 4 rows in flight" in ends[1].stderr
    assert errors(output) == [13]
    error = pq.read_table(output)["error"][13].as_py()
    assert error.startswith("process_died: the process died twice (Segmentation fault)")
    expected, found = (pq.read_table(p)["answer"].to_pylist() for p in (whole, output))
    assert found == [*expected[:13], None, *expected[14:]]
    assert invoke("verify", output).exit_code == 0
    assert not list(tmp_path.glob(".o*"))
