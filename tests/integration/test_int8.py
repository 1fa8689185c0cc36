"""Running a model in int8: smoothing, the option, and what belongs to a job."""

import json

import numpy as np
import pytest
import torch
from builders import random_weights, tiny_config, write_safetensors_model
from cli_runs import ROWS, answers, invoke, run

from batchllm import LLM, SamplingParams
from batchllm.attention.backend import make_backend
from batchllm.errors import UsageError
from batchllm.models.config import ModelConfig
from batchllm.models.llama import LlamaModel
from batchllm.models.operations import TorchOperations
from batchllm.models.smoothing import channel_factors
from batchllm.runner.smooth import smooth


def test_the_larger_the_activation_beside_its_weight_the_larger_its_factor():
    factors = channel_factors(torch.tensor([1.0, 100.0, 1.0, 0.0]), torch.tensor([1.0, 1, 0.01, 0]))
    assert factors[1] > factors[2] > factors[0]
    assert torch.isfinite(factors).all() and (factors > 0).all()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["plain", "biases", "qwen2"])
def test_smoothing_keeps_the_logits_and_evens_the_activations(tied, kind):
    bias = kind == "biases"
    raw = tiny_config(tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    if kind == "qwen2":
        raw["architectures"] = ["Qwen2ForCausalLM"]
    config = ModelConfig.from_hugging_face(raw)
    weights = {name: torch.from_numpy(weight) for name, weight in random_weights(raw).items()}
    for name, weight in weights.items():
        if name.endswith("layernorm.weight"):
            weight[3] *= 50  # a channel that outshines the others
    model = LlamaModel(config, torch.float32, TorchOperations())
    model.load(weights.items())
    tokens = torch.arange(20, 60)

    def causal(layer, qkv):
        kv = config.num_kv_heads
        queries, keys, values = qkv.split([config.num_heads, kv, kv], dim=1)
        out = torch.nn.functional.scaled_dot_product_attention(
            *[part.transpose(0, 1)[None] for part in (queries, keys, values)],
            is_causal=True,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1).reshape(len(qkv), -1)

    def logits():
        return model.logits(model.forward(tokens, causal, torch.arange(len(tokens))))

    def unevenness():
        for linear in model._linears():
            linear.observe()
        logits()
        return [float(p.max() / p.median()) for p in (x.input_peaks for x in model._linears())]

    before, uneven = logits(), unevenness()
    smooth(model, make_backend("reference", 16, config.head_dim), tokens.numpy(), 16, torch.float32)
    torch.testing.assert_close(logits(), before, atol=1e-4, rtol=1e-4)
    evened = unevenness()
    qkv = [1, 5]  # of two layers, the head before them
    assert all(evened[i] < 0.5 * uneven[i] for i in qkv), (uneven, evened)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_int8_is_nearly_the_model(tmp_path, backend):
    config = tiny_config(max_position_embeddings=512)
    model = write_safetensors_model(tmp_path / "model", config=config)
    prompts = [f"hello the {n}" for n in range(40)]
    params = SamplingParams(max_tokens=1)
    options = {"kv_memory": 16 << 20, "attention_backend": backend}
    plain = LLM(model, **options).generate(prompts, params)
    int8 = LLM(model, quantization="int8", **options).generate(prompts, params)
    same = np.mean(
        [
            a.output_token_ids.tolist() == b.output_token_ids.tolist()
            for a, b in zip(plain, int8, strict=True)
        ]
    )
    assert same > 0.5, same  # noise for weights: the likeliest tokens are close to each other


def test_a_job_in_int8_says_so_and_is_another_job(source, tmp_path, tiny_model):
    output = tmp_path / "out.parquet"
    done = run(source, output, tiny_model, "--quantization", "int8")
    assert done.exit_code == 0, done.stderr
    assert len(answers(output)) == ROWS
    shown = invoke("inspect", output, "--json")
    assert json.loads(shown.stdout)["summary"]["quantization"] == "int8"
    refused = run(source, output, tiny_model)
    assert refused.exit_code == 1
    assert "model.quantization is null, was 'int8'" in refused.stderr.replace('"', "'")


def test_an_unknown_quantization_is_refused(source, tmp_path, tiny_model):
    refused = run(source, tmp_path / "out.parquet", tiny_model, "--quantization", "int4")
    assert refused.exit_code == 2 and "int4" in refused.stderr and "int8" in refused.stderr
    with pytest.raises(UsageError, match="int4"):
        LLM(tiny_model, quantization="int4")
