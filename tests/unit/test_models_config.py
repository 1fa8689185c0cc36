"""Model configs: both styles of config.json, and what is refused."""

import pytest
from builders import tiny_config

from batchllm.errors import ModelError
from batchllm.models.config import ModelConfig, RopeScaling
from batchllm.models.layout import expected_tensors


def test_config_of_transformers_5_and_before_are_one():
    new = tiny_config(
        dtype="bfloat16", rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    )
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    config = ModelConfig.from_hugging_face(new)
    assert config == ModelConfig.from_hugging_face(old | {"torch_dtype": "bfloat16"})
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert (config.num_layers, config.num_kv_heads, config.head_dim) == (2, 2, 16)


def test_config_defaults():
    required = ("architectures", "vocab_size", "hidden_size", "intermediate_size")
    required += ("num_hidden_layers", "num_attention_heads")
    config = ModelConfig.from_hugging_face({k: tiny_config()[k] for k in required})
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert (config.rope_theta, config.rope_scaling) == (10_000.0, None)
    assert not (config.tie_word_embeddings or config.attention_bias or config.mlp_bias)
    assert (config.eos_token_ids, config.bos_token_id) == ((), None)


def test_llama3_rope_scaling():
    values = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    values |= {"rope_type": "llama3", "original_max_position_embeddings": 4096}
    scaling = ModelConfig.from_hugging_face(tiny_config(rope_parameters=values)).rope_scaling
    assert scaling == RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=4096)


@pytest.mark.parametrize(
    ("architecture", "biases"),
    [("LlamaForCausalLM", (True, True, True)), ("Qwen2ForCausalLM", (True, False, False))],
)
def test_biases_are_where_the_architecture_has_them(architecture, biases):
    raw = tiny_config(architectures=[architecture], attention_bias=True, mlp_bias=True)
    config = ModelConfig.from_hugging_face(raw)
    assert (config.attention_bias, config.attention_output_bias, config.mlp_bias) == biases
    shapes = expected_tensors(config)
    for name, has_bias in (("q", biases[0]), ("k", biases[0]), ("v", biases[0]), ("o", biases[1])):
        assert (f"model.layers.1.self_attn.{name}_proj.bias" in shapes) == has_bias
    assert ("model.layers.1.mlp.up_proj.bias" in shapes) == biases[2]


WINDOW = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}


@pytest.mark.parametrize(
    "changes",
    [
        WINDOW | {"use_sliding_window": False},
        WINDOW | {"sliding_window": None},
        WINDOW | {"max_window_layers": 2},
        WINDOW | {"layer_types": ["full_attention", "full_attention"]},
    ],
)
def test_a_window_that_no_layer_has_is_none(changes):
    raw = tiny_config(architectures=["Qwen2ForCausalLM"])
    assert ModelConfig.from_hugging_face(raw | changes) == ModelConfig.from_hugging_face(raw)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*supported: LlamaForCausalLM"),
        ({"architectures": None}, "supported: LlamaForCausalLM"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot be divided among 3"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64', not a whole number"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"head_dim": 15}, "odd"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised .gptq"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        (WINDOW, "layers from 1 on attend to a sliding window of 64"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"dual_chunk_attention_config": {"chunk_size": 64}}, "dual chunk"),
    ],
)
def test_configs_that_are_refused(changes, says):
    with pytest.raises(ModelError, match=says):
        ModelConfig.from_hugging_face(tiny_config(**changes))
