"""Several replicas: the same answers; and jobs on them, whoever is killed.

What jobs are for does not depend on what answers them, so their replicas are stubs, which are
started in no time: all but their engine is as always (see stub_replica.py).
"""

import json
import os
import signal

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_runs import answers, invoke
from process_checks import gone, hard_limit, tests_on_path

from batchllm import LLM, SamplingParams, replicas
from batchllm.replica_messages import Kept

pytestmark = pytest.mark.usefixtures(hard_limit.__name__, tests_on_path.__name__)
ROWS = 60


@pytest.fixture
def source(tmp_path):
    """Rows that share their beginning in groups; what a stub answers to each is known."""
    tokens = [[10 + i % 7] * 30 + [5 + i % 50] for i in range(ROWS)]
    pq.write_table(pa.table({"tokens": tokens}), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


@pytest.fixture
def expected(source):
    return [str(sum(tokens)) for tokens in pq.read_table(source)["tokens"].to_pylist()]


@pytest.fixture(autouse=True)
def stubs(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("batchllm.replicas._REPLICA", "stub_replica")


def words(source, output):
    prompt = ("--model", "fake", "--token-ids-column", "tokens", "--kv-memory", "16M")
    return ("run", source, output, *prompt, "--max-tokens", 3, "--data-parallel-size", 2)


def test_a_killed_replica_costs_nothing_but_time(source, tmp_path, expected, monkeypatch):
    monkeypatch.setenv("TEST_REPLICAS", "1 dies 9 of 5")
    output, summary = tmp_path / "o.parquet", tmp_path / "s.json"
    result = invoke(*words(source, output), "--summary", summary, "--window-rows", 40)
    assert result.exit_code == 0, result.stderr
    assert answers(output) == expected
    assert "replica 2 was ended from outside (Killed); the others answer" in result.stderr
    assert "in 2 replicas" in result.stderr and "replicas        2, losing " in result.stderr
    told = json.loads(summary.read_text())
    assert (told["rows"], told["failed"], told["windows"]) == (ROWS, 0, 2)
    assert told["replicas"] == 2 and told["division_repeated_tokens"] > 0
    assert gone(psutil.Process().children())
    assert invoke("verify", output).exit_code == 0


def test_after_a_crash_the_rows_in_flight_are_answered_one_at_a_time(
    source, tmp_path, expected, monkeypatch
):
    output = tmp_path / "o.parquet"
    for died in range(2):  # before the first answer, and with only the bad row in flight
        monkeypatch.setenv("TEST_REPLICAS", "0 dies 11 of 0,1 waits")
        result = invoke(*words(source, output))
        assert result.exit_code == 1
        *before, last = result.stderr.strip().splitlines()
        assert last == "batchllm: replica 1 crashed (Segmentation fault)"
        assert any("the process died (Segm" in line for line in before) == bool(died)
        assert gone(psutil.Process().children())
    monkeypatch.setenv("TEST_REPLICAS", "")
    assert invoke(*words(source, output)).exit_code == 0
    errors = pq.read_table(output)["error"].to_pylist()
    dead = [row for row, error in enumerate(errors) if error is not None]
    assert dead and all(errors[row].startswith("process_died: ") for row in dead)
    assert [a for a in answers(output) if a] == [e for i, e in enumerate(expected) if i not in dead]
    assert len(dead) == 2  # as many as the stub has in flight, whatever it is told


def test_processes_end_with_the_job_that_is_asked_to_stop(source, tmp_path, expected, monkeypatch):
    monkeypatch.setenv("TEST_REPLICAS", "1 waits")
    output, take = tmp_path / "o.parquet", replicas._take

    def take_and_stop(replica, message, *rest):
        take(replica, message, *rest)
        if isinstance(message, Kept):
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(replicas, "_take", take)  # a second one would end pytest

    monkeypatch.setattr(replicas, "_take", take_and_stop)
    stopped = invoke(*words(source, output))
    assert stopped.exit_code == 130 and "the same command goes on" in stopped.stderr
    assert gone(psutil.Process().children())
    monkeypatch.setenv("TEST_REPLICAS", "")
    resumed = invoke(*words(source, output))
    assert resumed.exit_code == 0 and "going on after " in resumed.stderr
    assert answers(output) == expected


def test_replicas_answer_alike_also_where_processes_share_each_ones_model(tiny_model, monkeypatch):
    monkeypatch.setattr("batchllm.replicas._REPLICA", "batchllm.replica")
    llm = LLM(tiny_model, kv_memory=16 << 20, data_parallel_size=2, tensor_parallel_size=2)
    prompts = [f"the same beginning, number {i % 7} {'x' * (i % 5)}" for i in range(30)]
    params = [SamplingParams(max_tokens=1 + i % 9, temperature=i % 3) for i in range(30)]
    one = LLM(tiny_model, kv_memory=16 << 20)
    for part in (slice(None), slice(5)):
        found = llm.generate(prompts[part], params[part])
        assert [o.text for o in found] == [
            o.text for o in one.generate(prompts[part], params[part])
        ]
    assert llm.metrics.rows == one.metrics.rows and llm.metrics.windows == 2
    assert llm.metrics.prompt_tokens == one.metrics.prompt_tokens
    repeated = llm.metrics.division_repeated_tokens
    assert llm.metrics.computed_prompt_tokens == one.metrics.computed_prompt_tokens + repeated
    assert llm.num_kv_blocks == one.num_kv_blocks
    processes = psutil.Process().children(recursive=True)
    assert len(processes) == 4
    assert "in 2 replicas in 2 processes each" in llm.describe()
    del llm  # whoever forgets to close it leaves nobody behind
    assert gone(processes)
