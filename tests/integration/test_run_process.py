"""`batchllm run` as a process among others: interrupted, with few threads, without a terminal."""

import json
import os

from cli_runs import answers, invoke

from batchllm.io.output import OutputStore


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
