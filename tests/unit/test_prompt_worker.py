"""The worker: the same prompts as made here, a window ahead, whatever becomes of the process."""

import os
import signal
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from builders import tiny_tokenizer
from deadly import Deadly

from batchllm.errors import OutputError
from batchllm.io.rows import Rows
from batchllm.prompt_worker import PromptWorker, prompts_ahead
from batchllm.text.prompts import PromptBuilder, PromptSpec
from batchllm.windows import Window


@pytest.fixture(autouse=True)
def always_a_process(monkeypatch):
    monkeypatch.setattr("batchllm.prompt_worker._WORTH_ROWS", 0)


@pytest.fixture
def builder():
    return PromptBuilder(PromptSpec(template="{{ t }} {{ n }}"), tiny_tokenizer(), 60)


def tables(count):
    texts = ["the hell", None, "x" * 100, "a\nb", ""]
    return [pa.table({"t": texts, "n": range(i, i + 5)}) for i in range(count)]


def same(found, expected):
    assert np.array_equal(found.tokens.values, expected.tokens.values)
    assert np.array_equal(found.tokens.offsets, expected.tokens.offsets)
    assert found.errors == expected.errors and expected.errors


def test_the_process_makes_the_same_prompts(builder):
    with closing(PromptWorker(builder)) as worker:
        for table in tables(3):
            worker.begin(table)
            same(worker.finish(), builder.build(table))
        process = worker._process
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("after", [0, 1])
def test_a_process_that_dies_costs_nothing(builder, after):
    with closing(PromptWorker(builder)) as worker:
        for number, table in enumerate(tables(3)):
            worker.begin(table)
            if number == after:
                os.kill(worker._process.pid, signal.SIGKILL)
                worker._process.wait()
            same(worker.finish(), builder.build(table))


@pytest.mark.parametrize("deadly", [[0, 3]])
def test_a_row_that_the_process_dies_of_fails_alone(deadly, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    monkeypatch.setenv("TEST_PROCESS", str(os.getpid()))
    spec = PromptSpec(prompt_column="t", max_tokens_column="n")
    builder = Deadly(spec, tiny_tokenizer(), 60)
    texts = ["deadly" if row in deadly else f"text {row}" for row in range(4)]
    table = pa.table({"t": texts, "n": range(1, 5)})
    with closing(PromptWorker(builder)) as worker:
        worker.begin(table)
        found = worker.finish()
        assert [row for row, e in found.errors.items() if e.code == "process_died"] == deadly
        expected = PromptBuilder(spec, tiny_tokenizer(), 60).build(table)
        for row in set(range(4)) - set(deadly):
            assert found.tokens[row].tolist() == expected.tokens[row].tolist()
            assert found.max_tokens[row] == expected.max_tokens[row]
        for row in deadly:
            assert len(found.tokens[row]) == 0


def test_processes_that_always_die_are_done_without(builder, monkeypatch):
    monkeypatch.setattr("batchllm.prompt_worker._COMMAND", ["-c", "pass"])
    with closing(PromptWorker(builder)) as worker:
        (table,) = tables(1)
        worker.begin(table)
        same(worker.finish(), builder.build(table))


def test_a_process_that_cannot_be_started_is_done_without(builder, monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with closing(PromptWorker(builder)) as worker:
        (table,) = tables(1)
        worker.begin(table)
        same(worker.finish(), builder.build(table))


def test_a_small_table_starts_no_process(builder, monkeypatch):
    monkeypatch.setattr("batchllm.prompt_worker._WORTH_ROWS", 6)
    with closing(PromptWorker(builder)) as worker:
        (table,) = tables(1)
        worker.begin(table)
        assert worker._process is None
        same(worker.finish(), builder.build(table))


def test_the_next_window_is_made_while_the_last_is_answered(builder):
    begun = []

    class Watched(PromptWorker):
        def begin(self, table):
            super().begin(table)
            begun.append(table)

    def wait_for(count):
        deadline = time.monotonic() + 30
        while len(begun) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        return len(begun)

    each = tables(3)
    windows = [Window(Rows(np.arange(5), table), 0) for table in each]
    with closing(Watched(builder)) as worker:
        ahead = prompts_ahead(windows, worker)
        assert wait_for(1) == 1  # before anybody asks
        for number, one in enumerate(ahead):
            assert wait_for(min(number + 2, 3)) == min(number + 2, 3)
            assert one.window is windows[number]
            same(one.prompts, builder.build(each[number]))
        assert list(prompts_ahead([], worker)) == []


def test_a_window_that_cannot_be_read_is_told(builder):
    def broken():
        yield Window(Rows(np.arange(5), tables(1)[0]), 0)
        raise OutputError("cannot hold rows")

    with closing(PromptWorker(builder)) as worker:
        ahead = prompts_ahead(broken(), worker)
        next(ahead)
        with pytest.raises(OutputError, match="cannot hold rows"):
            next(ahead)
