"""Models known by their shapes alone, and what a model without weights and tokenizer still has."""

import math

import numpy as np
import pytest
from builders import write_gguf_model

from batchllm.errors import UsageError
from batchllm.models import dummy_checkpoint
from batchllm.models.checkpoint import open_model
from batchllm.models.dummy_checkpoint import DummyCheckpoint
from batchllm.models.layout import expected_tensors
from batchllm.models.shapes import CONFIGS, get_config
from batchllm.prompting import prompt_tokenizer
from batchllm.simulate.shape import get_shape
from batchllm.text.prompts import PromptSpec

# As their authors state them.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
}


def test_shapes_have_the_published_number_of_parameters():
    assert CONFIGS.keys() == PARAMETERS.keys()
    for name, count in PARAMETERS.items():
        tensors = expected_tensors(get_config(name))
        assert sum(map(math.prod, tensors.values())) == count, name


def test_what_is_simulated_is_what_is_run():
    for name, config in CONFIGS.items():
        shape = get_shape(name)
        for size in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size"):
            assert getattr(shape, size) == getattr(config, size)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"load_format": "dummy"}, "none is given; there are: smollm2-135m, llama-3.2-1b"),
        ({"load_format": "dummy", "model_shape": "gpt-2"}, "no model shape named 'gpt-2'; there"),
        ({"load_format": "dummy", "model_shape": "llama-3-8b"}, "did you mean 'llama-3.1-8b'"),
        (
            {"load_format": "dummy", "model_shape": "llama-3.2-1b", "name": "fake"},
            "model 'fake' is given; leave out one",
        ),
        ({"model_shape": "llama-3.2-1b"}, "is for load format dummy"),
        ({"load_format": "gguf"}, "load format is 'gguf'; choose one of auto, dummy"),
    ],
)
def test_what_makes_no_sense_together(arguments, says):
    with pytest.raises(UsageError, match=says):
        open_model(**arguments)


def test_identity_is_that_of_the_shape():
    one, other = (
        open_model(load_format="dummy", model_shape=name).identity()
        for name in ("llama-3.2-1b", "llama-3.1-8b")
    )
    assert one == DummyCheckpoint.of("llama-3.2-1b").identity() and one != other


def test_text_of_answers_is_their_ids():
    tokenizer = DummyCheckpoint.of("smollm2-135m").tokenizer()
    ids = [np.array([0, 17, 49_151], np.int32), np.array([], np.int32)]
    assert tokenizer.decode_batch(ids) == ["0 17 49151", ""]
    assert tokenizer.encode_batch(["0 17 49151"], add_special_tokens=True)[0].tolist() == [
        *(0, 17, 49_151)
    ]
    assert tokenizer.eos_token_ids == (0,) and tokenizer.chat_template is None


def test_text_prompts_go_through_the_default_models_tokenizer(tmp_path, monkeypatch):
    path = write_gguf_model(tmp_path / "default.gguf")
    monkeypatch.setattr(dummy_checkpoint, "find_registered", lambda *_: path)
    checkpoint = DummyCheckpoint.of("smollm2-135m")
    text, ids = PromptSpec(prompt_column="t"), PromptSpec(token_ids_column="t")
    encoded = prompt_tokenizer(checkpoint, text).encode_batch(["the"], add_special_tokens=False)
    assert len(encoded[0]) == 1
    assert prompt_tokenizer(checkpoint, text).chat_template is not None
    assert prompt_tokenizer(checkpoint, ids) is checkpoint.tokenizer()


def test_without_that_text_is_refused(monkeypatch):
    monkeypatch.setattr(dummy_checkpoint, "find_registered", lambda *_: None)
    checkpoint = DummyCheckpoint.of("smollm2-135m")
    with pytest.raises(UsageError, match="give token ids"):
        prompt_tokenizer(checkpoint, PromptSpec(prompt_column="t"))
    prompt_tokenizer(checkpoint, PromptSpec(token_ids_column="t"))
