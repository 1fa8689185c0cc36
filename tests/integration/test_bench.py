"""`batchllm bench` on a model small enough for a test; what it times is the benchmark's affair."""

import pytest
from cli_runs import invoke

from batchllm import LLM
from batchllm.bench import Bench, Workload
from batchllm.runner.timed import ATTENTION, PARTS, PRODUCTS, SCHEDULER, Clock
from batchllm.simulate.machine import MACHINES

WORKLOAD = Workload("4x3", 4, 3, 40, 8, 6)


def test_the_parts_of_a_step_are_all_of_it(tiny_model):
    clock = Clock()
    bench = Bench(LLM(tiny_model, clock=clock, kv_memory=16 << 20), clock)
    for _ in range(2):  # the second run's parts are its own
        run = bench.run(WORKLOAD)
        assert sum(clock.seconds.values()) == pytest.approx(run.seconds)
    assert set(clock.seconds) == set(PARTS)
    assert all(clock.seconds[part] > 0 for part in (PRODUCTS, ATTENTION, SCHEDULER))
    assert [len(answer) for answer in run.answers] == [6] * 12


def test_what_is_printed_names_each_part(tiny_model):
    clock = Clock()
    bench = Bench(LLM(tiny_model, clock=clock, kv_memory=16 << 20), clock)
    text = bench.check(WORKLOAD, MACHINES["cpu"]).as_text()
    assert all(part in text for part in PARTS)
    assert "of T_opt" in text and "planning" in text and "writing answers" in text


def test_a_clock_changes_no_answer(tiny_model):
    prompts = ["the hello", "hello the", "the hello 123"]
    plain, timed = (
        LLM(tiny_model, clock=clock, kv_memory=16 << 20).generate(prompts)
        for clock in (None, Clock())
    )
    assert [o.text for o in plain] == [o.text for o in timed]


def test_calibrating_in_int8_is_refused(tiny_model):
    refused = invoke("bench", "--model", tiny_model, "--calibrate", "--quantization", "int8")
    assert refused.exit_code == 2 and "--calibrate" in refused.stderr
