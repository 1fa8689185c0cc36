"""Random weights of a known shape: sane, always the same, and enough to run jobs and benchmarks."""

import itertools
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import tiny_config, write_gguf_model
from cli_runs import answers, invoke

from batchllm import LLM, SamplingParams, bench
from batchllm.bench import Workload
from batchllm.errors import UsageError
from batchllm.models import dummy_checkpoint, random_weights
from batchllm.models.checkpoint import open_checkpoint
from batchllm.models.config import ModelConfig
from batchllm.models.dummy_checkpoint import DummyCheckpoint
from batchllm.models.layout import expected_tensors
from batchllm.models.random_weights import _tiled, random_tensors
from batchllm.models.shapes import CONFIGS

ENGINES = Path(__file__).parents[2] / "scripts" / "bench_engines"
OPTIONS = {"kv_memory": 16 << 20, "dtype": "float32"}
TINY = ["--load-format", "dummy", "--model-shape", "tiny"]
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture
def tiny(monkeypatch):
    """A shape of the name `tiny`, small but for its vocabulary; and nothing that text needs."""
    raw = tiny_config(architectures=["Qwen2ForCausalLM"], vocab_size=49_152)
    config = ModelConfig.from_hugging_face(raw)
    monkeypatch.setitem(CONFIGS, "tiny", config)
    monkeypatch.setattr(dummy_checkpoint, "find_registered", lambda *_: None)
    return config


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table({"ids": prompts(9), "text": ["a"] * 9}), path)
    return path


def prompts(count):
    """Of 43 tokens, 40 of them shared."""
    rng = np.random.default_rng(0)
    head = rng.integers(20, 49_152, 40).tolist()
    return [head + rng.integers(20, 49_152, 3).tolist() for _ in range(count)]


def ids_of(outputs):
    return [output.output_token_ids.tolist() for output in outputs]


def test_weights_are_of_the_scale_that_keeps_sizes_as_they_are():
    config = CONFIGS["llama-3.2-1b"]
    shapes = dict(itertools.islice(expected_tensors(config).items(), 9))
    tensors = dict(random_tensors(shapes, torch.bfloat16))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        if name.endswith("norm.weight"):
            assert (tensor == 1).all()
            continue
        gain = 2**0.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1
        values = tensor[:512].float()
        assert values.std().item() * values.shape[1] ** 0.5 == pytest.approx(gain, rel=0.02)
        assert values.mean().abs() < 1e-3
        rows = values / values.norm(dim=1, keepdim=True)
        others = (rows @ rows.T).fill_diagonal_(0)
        assert others.abs().max() < 0.15, f"{name}: two rows are alike"
    gate, up = (tensors[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert not torch.equal(gate, up)
    beginnings = tensors["model.embed_tokens.weight"][:, :8].float()
    assert len(beginnings.unique(dim=0)) == config.vocab_size


@pytest.mark.parametrize("count", [0, 3, 7, 11, 12, 50])
def test_a_tensor_is_the_drawn_numbers_from_some_place_on_again_and_again(count):
    drawn = torch.arange(11.0)
    for start in range(11):
        expected = 2 * drawn.repeat(6)[start : start + count]
        assert torch.equal(_tiled(drawn, start, count, 2.0), expected)


def test_weights_are_made_one_at_a_time_and_where_torch_makes_tensors(monkeypatch):
    def tiled(drawn, start, count, scale):  # on `meta`, multiplying costs seconds of imports
        return drawn.new_empty(count)

    monkeypatch.setattr(random_weights, "_tiled", tiled)
    with torch.device("meta"):
        whole = DummyCheckpoint.of("llama-3.1-8b").weights()
        name, tensor = next(whole)
    assert name == "model.embed_tokens.weight" and tensor.shape == (128_256, 4096)
    assert tensor.device.type == "meta" and tensor.dtype == torch.bfloat16


def test_answers_are_always_the_same_shared_or_not(tiny):
    options = {"load_format": "dummy", "model_shape": "tiny", **OPTIONS}
    first = LLM(**options)
    expected = ids_of(first.generate(prompts(9), PARAMS))
    assert first.metrics.saved_share > 0.5
    assert len({tuple(answer) for answer in expected}) == 9
    assert ids_of(LLM(**options).generate(prompts(9), PARAMS)) == expected
    apart = LLM(**options, sharing=False)
    assert ids_of(apart.generate(prompts(9), PARAMS)) == expected
    assert apart.metrics.saved_share == 0


def test_attention_looks_at_what_came_before(tiny):
    llm = LLM(load_format="dummy", model_shape="tiny", **OPTIONS)
    same_end = [[7 + i, *prompts(1)[0][1:]] for i in range(20)]
    assert len({tuple(answer) for answer in ids_of(llm.generate(same_end, PARAMS))}) > 10


def test_a_shape_as_small_as_the_default_model():
    """With a real shape's depth: the logits are finite, and the answers of text ids."""
    llm = LLM(load_format="dummy", model_shape="smollm2-135m", max_model_len=256, **OPTIONS)
    outputs = llm.generate(prompts(2), SamplingParams(max_tokens=3, ignore_eos=True))
    for output in outputs:
        assert output.error is None
        assert output.text == " ".join(map(str, output.output_token_ids))
    assert "random" in llm.describe() and "dummy-smollm2-135m" in llm.describe()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_int8_is_smoothed_without_a_text(tiny, backend):
    llm = LLM(DummyCheckpoint.of("tiny"), quantization="int8", attention_backend=backend, **OPTIONS)
    assert [output.error for output in llm.generate(prompts(3), PARAMS)] == [None] * 3


def test_an_opened_checkpoint_is_what_it_is(tiny):
    with pytest.raises(UsageError, match="opened checkpoint"):
        LLM(DummyCheckpoint.of("tiny"), load_format="dummy", model_shape="tiny")


def test_a_job_of_token_ids_needs_no_file_but_its_input(tiny, source, tmp_path):
    output = tmp_path / "out.parquet"
    words = ["run", source, output, "--kv-memory", "16M", "--max-tokens", 4, "--quiet"]
    ids = [*words, "--token-ids-column", "ids"]
    done = invoke(*ids, *TINY)
    assert done.exit_code == 0, done.stderr
    assert all(1 <= len(answer.split()) <= 4 for answer in answers(output))
    shown = json.loads(invoke("inspect", output, "--json").stdout)
    assert (
        shown["identity"]["model"] | {"format": "dummy", "shape": "tiny"}
        == (shown["identity"]["model"])
    )
    assert shown["summary"]["model"] == "dummy-tiny"
    refused = invoke(*ids, "--model", "fake")
    assert refused.exit_code == 1 and "model.format is" in refused.stderr
    refused = invoke(*words, "--prompt-column", "text", *TINY)
    assert refused.exit_code == 2 and "give token ids" in refused.stderr
    refused = invoke(*ids, "--load-format", "dummy")
    assert refused.exit_code == 2 and "llama-3.1-8b" in refused.stderr


def test_a_job_of_text_is_one_of_the_default_models_tokenizer(tiny, source, tmp_path, monkeypatch):
    path = write_gguf_model(tmp_path / "default.gguf")
    monkeypatch.setattr(dummy_checkpoint, "find_registered", lambda *_: path)
    output = tmp_path / "out.parquet"
    words = ["run", source, output, "--prompt-column", "text", "--max-tokens", 4, "--quiet"]
    done = invoke(*words, "--kv-memory", "16M", *TINY)
    assert done.exit_code == 0, done.stderr
    assert all(answer.split()[0].isdigit() for answer in answers(output))
    model = json.loads(invoke("inspect", output, "--json").stdout)["identity"]["model"]
    assert model["tokenizer"] == open_checkpoint(path).tokenizer().fingerprint


def test_a_plan_of_token_ids_for_a_model_and_machine_that_are_not_here(tiny, source):
    words = ["plan", source, "--token-ids-column", "ids", "--simulate", "--machine", "h100"]
    shown = invoke(*words, "--load-format", "dummy", "--model-shape", "qwen2.5-7b", "--json")
    assert shown.exit_code == 0, shown.stderr
    assert "simulation" in json.loads(shown.stdout)


def test_bench_runs_and_the_shapes_are_listed(tiny, monkeypatch):
    monkeypatch.setattr(bench, "CHECKS", (Workload("2x2", 2, 2, 30, 3, 4),))
    shown = invoke("bench", *TINY)
    assert shown.exit_code == 0, shown.stderr
    assert "2x2" in shown.stdout and "random" in shown.stderr
    assert "llama-3.2-1b" in invoke("models").stdout


def test_the_ladders_engine_runs_a_shape(tiny, source, tmp_path, monkeypatch, capsys):
    path = tmp_path / "workload.parquet"
    table = pq.read_table(source)
    lengths = pa.array([3] * len(table), pa.int32())
    pq.write_table(pa.table({"token_ids": table["ids"], "max_tokens": lengths}), path)
    words = ["engine", path, "--name", "ours", "--model-shape", "tiny", "--kv-memory", "16M"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    monkeypatch.syspath_prepend(ENGINES)
    runpy.run_path(str(ENGINES / "batchllm_engine.py"), run_name="__main__")
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["output_tokens"]) == (9, 27)
    assert report["settings"]["kv_memory"] == 16 << 20
