"""Weights and configs as transformers loads them, from GGUF and from safetensors, bit for bit."""

import copy

import numpy as np
import pytest
import torch
from builders import (
    random_weights,
    tiny_config,
    write_gguf_model,
    write_safetensors_model,
    write_tokenizer,
)
from oracle import load_gguf_model

from batchllm.models import locate
from batchllm.models.checkpoint import open_checkpoint

needs_model = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def assert_same_weights(ours, theirs, tied=True):
    """`ours` yields (name, tensor); `theirs` is a state dict, where tied heads may stand twice."""
    seen = set()
    for name, tensor in ours:
        assert name not in seen
        seen.add(name)
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    assert theirs.keys() - seen <= ({"lm_head.weight"} if tied else set())


# Tiny models: no transformers, only torch.


def test_tiny_safetensors_weights(tmp_path):
    weights = random_weights(tiny_config())
    for shards in (1, 3):
        checkpoint = open_checkpoint(write_safetensors_model(tmp_path / f"{shards}", shards=shards))
        loaded = dict(checkpoint.weights())
        assert loaded.keys() == weights.keys()
        for name, tensor in loaded.items():
            assert tensor.dtype == torch.float32
            np.testing.assert_array_equal(tensor.numpy(), weights[name])
        for name, tensor in checkpoint.weights(torch.bfloat16):
            assert torch.equal(tensor, torch.from_numpy(weights[name]).to(torch.bfloat16))


@pytest.mark.parametrize("tied", [True, False])
def test_tiny_gguf_weights(tmp_path, tied, monkeypatch):
    monkeypatch.setattr("batchllm.models.gguf_checkpoint._CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr("batchllm.models.gguf_checkpoint._COPY_ELEMENTS", 300)
    config = tiny_config(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    weights = random_weights(config)
    checkpoint = open_checkpoint(
        write_gguf_model(tmp_path / "m.gguf", config=config, weights=weights)
    )
    assert checkpoint.config.attention_bias
    assert checkpoint.config.mlp_bias
    loaded = dict(checkpoint.weights())
    assert loaded.keys() == weights.keys()
    for name, tensor in loaded.items():
        np.testing.assert_array_equal(tensor.numpy(), weights[name])


@pytest.mark.parametrize("qtype", ["F16", "BF16", "Q8_0"])
def test_tiny_quantised_gguf_weights_are_near(tmp_path, qtype):
    weights = random_weights(tiny_config())
    checkpoint = open_checkpoint(
        write_gguf_model(tmp_path / "m.gguf", weights=weights, qtype=qtype)
    )
    for name, tensor in checkpoint.weights():
        assert tensor.dtype == torch.float32
        np.testing.assert_allclose(tensor.numpy(), weights[name], atol=5e-3)
    for name, tensor in checkpoint.weights(torch.float16):
        assert tensor.dtype == torch.float16
        np.testing.assert_allclose(tensor.float().numpy(), weights[name], atol=6e-3)


# The default model, against transformers.


@pytest.fixture(scope="module")
def path():
    return locate.resolve(None)


@pytest.fixture(scope="module")
def model(path):
    return load_gguf_model(path)


class TestDefaultModel:
    pytestmark = needs_model

    def test_config(self, path, model):
        ours, theirs = open_checkpoint(path).config, model.config
        for our_name, their_name in {
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "intermediate_size": "intermediate_size",
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
            "rms_norm_eps": "rms_norm_eps",
            "max_position_embeddings": "max_position_embeddings",
            "tie_word_embeddings": "tie_word_embeddings",
            "bos_token_id": "bos_token_id",
        }.items():
            assert getattr(ours, our_name) == getattr(theirs, their_name), our_name
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"] == 100_000
        assert theirs.eos_token_id in ours.eos_token_ids

    def test_gguf_float32(self, path, model):
        assert_same_weights(open_checkpoint(path).weights(), model.state_dict())

    def test_gguf_bfloat16(self, path, model):
        expected = {n: t.to(torch.bfloat16) for n, t in model.state_dict().items()}
        assert_same_weights(open_checkpoint(path).weights(torch.bfloat16), expected)

    @pytest.mark.parametrize("shard", ["1GB", "100MB"])
    def test_safetensors_saved_by_transformers(self, model, tmp_path, shard):
        half = copy.deepcopy(model).to(torch.bfloat16)
        half.save_pretrained(tmp_path, max_shard_size=shard)
        write_tokenizer(tmp_path)
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "100MB")
        checkpoint = open_checkpoint(tmp_path)
        assert checkpoint.config.dtype == "bfloat16"
        assert checkpoint.config.rope_theta == 100_000
        assert_same_weights(checkpoint.weights(), half.state_dict())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_model_with_everything_different_saved_by_transformers(tmp_path):
    """Untied, with biases, grouped heads of an odd size, and Llama 3's rope scaling."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=12,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        eos_token_id=[7, 8],
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert_same_weights(checkpoint.weights(), model.state_dict(), tied=False)
    ours = checkpoint.config
    assert (ours.num_heads, ours.num_kv_heads, ours.head_dim) == (6, 3, 12)
    assert (ours.rope_theta, ours.eos_token_ids, ours.dtype) == (5e5, (7, 8), "float32")
    assert ours.rope_scaling is not None
    assert ours.rope_scaling.kind == "llama3"
    assert ours.rope_scaling.original_max_position_embeddings == 64
