"""`batchllm bench` on a model small enough for a test; what it times is the benchmark's affair."""

import pytest
from cli_runs import invoke

from batchllm import LLM
from batchllm.bench import Bench, BenchRun, Workload
from batchllm.runner.clock import ATTENTION, PARTS, PRODUCTS, SCHEDULER, Clock
from batchllm.simulate.calibrate import MeasuredStep
from batchllm.simulate.machine import MACHINES
from batchllm.simulate.saved import this_machine

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


def test_calibrating_goes_by_the_fastest_of_several_rounds(tiny_model, tmp_path, monkeypatch):
    small = (Workload("few", 2, 2, 20, 3, 3), Workload("more", 3, 4, 10, 5, 2))
    monkeypatch.setattr("batchllm.bench.CALIBRATION", small)
    monkeypatch.setattr("batchllm.bench.CHECKS", (WORKLOAD,))
    monkeypatch.setattr("batchllm.runner.measure._SECONDS", 0.0)
    monkeypatch.setenv("BATCHLLM_CACHE", str(tmp_path))
    shown = invoke("bench", "--model", tiny_model, "--calibrate", "--threads", 1)
    assert shown.exit_code == 0, shown.stderr
    rounds = [line for line in shown.stderr.splitlines() if line.startswith("round ")]
    assert len(rounds) == 3 * (1 + len(small) + 1) and rounds[-1] == "round 3 of 3: 4x3"
    assert shown.stdout.count("predicted") == 1
    machine = this_machine(tmp_path)
    assert machine != MACHINES["cpu"] and machine.as_text() in shown.stdout


def test_the_fastest_of_each_step_is_taken_and_parts_are_of_all_of_it():
    def run(*seconds, parts):
        return BenchRun([MeasuredStep(None, s) for s in seconds], [], parts)

    runs = [run(3.0, 1.0, parts={"a": 3.0, "b": 1.0}), run(2.0, 3.0, parts={"a": 1.0, "b": 4.0})]
    fastest = BenchRun.fastest(runs)
    assert [step.seconds for step in fastest.steps] == [2.0, 1.0] and fastest.seconds == 3.0
    assert fastest.parts == {"a": 2.25, "b": 0.75}
    machine = MACHINES["cpu"].at_best(((4, 1.0), (64, 900e9)), 1.0)
    assert machine.gemm_rates == ((4, 137e9), (64, 900e9))
    assert machine.bandwidth == MACHINES["cpu"].bandwidth


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
