"""The ladder goes on where it was cut off, and asks engines for what it should."""

import argparse
import json
from pathlib import Path

import pytest
from ladder_runs import run
from yardstick import load_ladder

bench = load_ladder("bench")
engines = load_ladder("bench_engines.engines")
ledger = load_ladder("bench_engines.ledger")

WEIGHTS = engines.Weights(ours=Path("m.gguf"), peers=Path("m"), peers_int8=Path("model-int8"))
HERE = {"cpu": "an abacus", "cores": 2}


def open_ledger(path, *, resume=False, machine=HERE):
    return ledger.Ledger.open(path, machine, resume=resume)


def test_runs_survive_their_file(tmp_path):
    path = tmp_path / "runs.json"
    first = open_ledger(path)
    runs = [run("a", "vllm", 2.5, order="sorted", kv_cache_gib=4), run("b", "batchllm", 3.0)]
    for one in runs:
        first.add(one)
        assert open_ledger(path, resume=True).runs == first.runs
    assert first.runs == runs
    assert [p.name for p in tmp_path.iterdir()] == ["runs.json"]


def test_runs_are_not_overwritten_unasked(tmp_path):
    path = tmp_path / "runs.json"
    open_ledger(path).add(run("a", "batchllm", 1.0))
    with pytest.raises(engines.BenchError, match="--resume"):
        open_ledger(path)


def test_runs_of_two_machines_do_not_mix(tmp_path):
    path = tmp_path / "runs.json"
    open_ledger(path).add(run("a", "batchllm", 1.0))
    with pytest.raises(engines.BenchError, match="another machine"):
        open_ledger(path, resume=True, machine={"cpu": "a slide rule", "cores": 1})


@pytest.mark.parametrize("text", ["", "{}", '{"runs": [{"workload": "a"}]}', '{"runs": 3}'])
def test_what_is_no_ledger_is_refused(tmp_path, text):
    path = tmp_path / "runs.json"
    path.write_text(text)
    with pytest.raises(engines.BenchError, match="no ladder's JSON"):
        open_ledger(path, resume=True)


def test_runs_of_another_size_do_not_mix():
    runs = open_ledger(None)
    runs.add(run("a", "batchllm", 1.0))
    runs.check_size("a", rows=10, prompt_tokens=900)
    runs.check_size("b", rows=1, prompt_tokens=1)
    with pytest.raises(engines.BenchError, match="10 rows"):
        runs.check_size("a", rows=11, prompt_tokens=900)


def climb(monkeypatch, path, *, names="batchllm,vllm", rounds=2, fail_at=None):
    """Runs the ladder with engines that only note that they ran; returns what ran."""
    ran = []

    def run_cell(prepared, number, chosen, sizes):
        for engine in chosen:
            if (prepared.workload.name, number, engine.name) == fail_at:
                raise engines.BenchError("out of breath")
            ran.append((number, prepared.workload.name, engine.name))
            yield run(prepared.workload.name, engine.name, 1.0, number=number)

    monkeypatch.setattr(bench, "run_cell", run_cell)
    monkeypatch.setattr(
        bench, "prepare", lambda workload, model, ledger: bench.Prepared(workload, path, None)
    )
    monkeypatch.setattr(engines.Engine, "check_there", lambda self: None)
    arguments = argparse.Namespace(
        engines=names,
        workloads="8x32,4x16",
        rounds=rounds,
        model=Path("model"),
        model_shape=None,
        python=Path("python"),
        batch_sizes=[32],
        markdown=None,
    )
    resumed = open_ledger(path, resume=True)
    try:
        bench.climb(arguments, resumed)
    except engines.BenchError:
        assert fail_at is not None
    return ran


def test_rounds_are_outermost(monkeypatch, tmp_path):
    ran = climb(monkeypatch, tmp_path / "runs.json")
    assert [(number, workload) for number, workload, engine in ran if engine == "vllm"] == [
        (1, "8x32"),
        (1, "4x16"),
        (2, "8x32"),
        (2, "4x16"),
    ]


def test_a_cell_that_was_cut_off_is_run_again_whole(monkeypatch, tmp_path):
    path = tmp_path / "runs.json"
    before = climb(monkeypatch, path, fail_at=("4x16", 1, "vllm"))
    assert before[-1] == (1, "4x16", "batchllm")
    after = climb(monkeypatch, path)
    assert after == [
        (number, workload, engine)
        for number, workload in ((1, "4x16"), (2, "8x32"), (2, "4x16"))
        for engine in ("batchllm", "vllm")
    ]
    kept = [
        (r["round"], r["workload"], r["report"]["engine"])
        for r in json.loads(path.read_text())["runs"]
    ]
    assert len(kept) == len(set(kept)) == 8
    assert climb(monkeypatch, path) == []


def test_an_engine_can_be_added_later(monkeypatch, tmp_path):
    path = tmp_path / "runs.json"
    climb(monkeypatch, path, rounds=1)
    ran = climb(monkeypatch, path, names="vllm-int8", rounds=1)
    assert ran == [(1, "8x32", "vllm-int8"), (1, "4x16", "vllm-int8")]
    assert len(open_ledger(path, resume=True).runs) == 6


def test_who_goes_first_changes():
    turns = [bench.alternated(["a", "b"], number) for number in (1, 2, 3)]
    assert turns == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_commands():
    known = engines.engines(WEIGHTS, Path("py"), [16, 32])
    ours = known["batchllm"].command(Path("w"), ["shuffled"])
    assert ours[0] == "py"
    assert ours[1].endswith("batchllm_engine.py")
    assert ours[2:4] == ["w", "--name"]
    assert " ".join(ours[4:]) == "batchllm --model m.gguf --order shuffled"
    assert known["vllm-int8"].model.name == "model-int8"
    assert known["transformers"].options == ("--batch-size", "16", "32")


def test_the_batch_size_that_won_is_kept():
    engine = engines.engines(WEIGHTS, Path("py"), [16, 32])["transformers"]
    runs = [run("a", "transformers", 1.0, batch_size=16), run("a", "batchllm", 1.0)]
    assert bench.settled(engine, "a", runs).options == ("--batch-size", "16")
    assert bench.settled(engine, "b", runs) == engine


def test_unknown_names_are_refused():
    with pytest.raises(engines.BenchError, match="no such engine: rllm; have vllm"):
        bench.choose({"vllm": 1}, "rllm", "engine")


def test_a_missing_environment_says_what_to_do(tmp_path):
    engine = engines.Engine("vllm", "vllm_engine.py", tmp_path / "no", tmp_path)
    with pytest.raises(engines.BenchError, match="bench_setup"):
        engine.check_there()


def test_a_failing_process_tells_its_last_words():
    with pytest.raises(engines.BenchError, match=r"exit code 3(.|\n)*alas"):
        engines.run_json(["sh", "-c", "echo alas; exit 3"])
    assert engines.run_json(["sh", "-c", "echo noise; echo '{\"a\": 1}'"]) == [{"a": 1}]
