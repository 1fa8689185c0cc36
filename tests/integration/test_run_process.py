"""`batchllm run` as a process among others: interrupted, with few threads, without a terminal."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
from cli_runs import answers, invoke

from batchllm.io.output import OutputStore


def command(source, output, model, *extra):
    words = [sys.executable, "-m", "batchllm.cli", "run", source, output, "--model", model]
    words += ["--prompt-column", "text", "--kv-memory", "16M", "--max-tokens", 200]
    return [str(w) for w in [*words, "--ignore-eos", *extra]]


def listen_to_interrupts():
    """A shell's background jobs, these tests perhaps among them, inherit that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupted_run_goes_on(source, table, tmp_path, tiny_model):
    output = tmp_path / "o.parquet"
    # Several windows take seconds, so the signal comes well before the end; the runs after it have
    # one window each and take no time.
    words = command(source, output, tiny_model, "--window-rows", 5)
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, text=True, preexec_fn=listen_to_interrupts
    ) as process:
        manifest = tmp_path / ".o.parquet.batchllm" / "manifest.jsonl"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if manifest.exists() and manifest.read_text().count("\n") >= 3:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130, stderr
    assert "goes on" in stderr and "Traceback" not in stderr
    assert not output.exists()
    assert "unfinished" in invoke("inspect", output).stdout
    environment = os.environ | {"COLUMNS": "200"}
    words = command(source, output, tiny_model)
    again = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert again.returncode == 0, again.stderr
    assert "rows that are done already" in again.stderr
    whole = tmp_path / "whole.parquet"
    subprocess.run(command(source, whole, tiny_model, "--quiet"), check=True)
    resumed, once = (pq.read_table(p).drop_columns("cached_tokens") for p in (output, whole))
    assert resumed.equals(once)  # but for what was shared: the windows were others


def test_threads_are_chosen_printed_and_no_part_of_the_job(
    source, tmp_path, tiny_model, expected, monkeypatch
):
    write = OutputStore.write_answers

    def fail_at_the_third(store, rows, *rest):
        if len(store.counters) == 2:
            raise KeyboardInterrupt
        write(store, rows, *rest)

    output, summary = tmp_path / "o.parquet", tmp_path / "s.json"
    words = ("run", source, output, "--model", tiny_model, "--prompt-column", "text")
    words += ("--kv-memory", "16M", "--max-tokens", 6, "--window-rows", 7, "--summary", summary)
    monkeypatch.setattr(OutputStore, "write_answers", fail_at_the_third)
    one = invoke(*words, "--threads", 1)
    assert one.exit_code == 130
    assert "1 thread (as asked), 0.02 GiB KV memory = " in one.stderr
    monkeypatch.undo()
    many = 1 + (os.cpu_count() or 1)
    other = invoke(*words, "--threads", many)
    assert other.exit_code == 0, other.stderr
    assert f"{many} threads (as asked)" in other.stderr
    assert other.stderr.count(f"\nwarning: {many} threads, but this process may use ") == 1
    assert json.loads(summary.read_text())["threads"] == many
    assert f"; threads {many}, KV memory 0.02 GiB" in invoke("inspect", output).stdout
    assert answers(output) == expected
    complete = invoke(*words)
    assert complete.exit_code == 0 and "complete already" in complete.stderr


def test_bench_says_what_it_runs_on(tiny_model, monkeypatch):
    monkeypatch.setattr("batchllm.bench.CHECKS", ())
    result = invoke("bench", "--model", tiny_model, "--threads", 1)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "1 thread (as asked), " in result.stderr
    assert invoke("bench", "--model", tiny_model, "--threads", 0).exit_code == 2


def test_progress_is_lines_where_there_is_no_terminal(source, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr("batchllm.progress._EVERY_SECONDS", 0.0)
    result = invoke(
        *("run", source, tmp_path / "o.parquet", "--model", tiny_model, "--max-tokens", 4),
        *("--prompt-column", "text", "--kv-memory", "16M"),
    )
    assert result.exit_code == 0
    lines = [line for line in result.stderr.splitlines() if "rows (" in line]
    assert lines and "of prompt tokens saved" in lines[-1]
    assert "\x1b" not in result.stderr
