"""Model files from strangers: no value of a wrong type, size or place gets past the opening."""

import json
import struct
from contextlib import suppress

import numpy as np
import pytest
import tokenizers
from builders import (
    byte_level_metadata,
    tiny_config,
    tiny_tokenizer,
    write_gguf_model,
    write_json,
    write_safetensors_model,
    write_tokenizer,
)

from batchllm.errors import ModelError
from batchllm.models.checkpoint import open_checkpoint
from batchllm.models.locate import resolve
from batchllm.text.cuts import longest_token
from batchllm.text.tokenizer import Tokenizer


def refuses(path, says):
    with pytest.raises(ModelError, match=says) as caught:
        open_checkpoint(path).tokenizer()
    message = str(caught.value)
    assert str(path) in message and message.isprintable() and len(message) <= 1000


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"tokenizer.ggml.eos_token_id": "two"}, "eos_token_id is 'two', not a whole number"),
        ({"tokenizer.ggml.eos_token_id": True}, "eos_token_id is True, not a whole number"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokens is a list of 2, not a list of texts"),
        ({"tokenizer.ggml.token_type": ["a"] * 270}, "a list of 270, not a list of numbers"),
        ({"tokenizer.ggml.merges": 3}, "merges is 3, not a list of texts"),
        ({"tokenizer.ggml.merges": ["a"]}, "tokenizer is damaged"),
        ({"tokenizer.ggml.pre": ["smollm"]}, "pre is a list of 1, not text"),
        ({"tokenizer.ggml.add_bos_token": [1, 0]}, "add_bos_token is a list of 2, not true or"),
        ({"tokenizer.chat_template": 3}, "chat_template is 3, not text"),
        ({"general.architecture": ["llama"]}, "not text"),
        ({"llama.rope.freq_base": "x"}, "freq_base is 'x', not a number"),
        ({"llama.rope.freq_base": -1.0}, "freq_base is -1.0, not a positive number"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "not a finite number"),
        ({"llama.block_count": 2**31}, "2,147,483,648 layers, but there are only"),
        ({"split.count": [1, 2]}, "split GGUF"),
    ],
)
def test_gguf_values_of_a_wrong_type(tmp_path, metadata, says):
    tokenizer = byte_level_metadata()
    for key in metadata:
        tokenizer.pop(key, None)
    path = write_gguf_model(tmp_path / "m.gguf", tokenizer=tokenizer, metadata=metadata)
    refuses(path, says)


@pytest.mark.parametrize("count", [2**64 - 1, 2**40])
@pytest.mark.parametrize("at", [8, 16])
def test_gguf_counts_that_no_file_can_hold(tmp_path, at, count):
    whole = write_gguf_model(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])
    refuses(tmp_path / "m.gguf", r"truncated or corrupt|unknown type|0 dimensions")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_hidden_layers": 10**12}, "layers, but there are only"),
        ({"rms_norm_eps": 10**400}, "not a finite number"),
        ({"rope_theta": float("inf"), "rope_parameters": None}, "not a finite number"),
        ({"eos_token_id": 2**31}, "not a token id"),
    ],
)
def test_config_values_without_measure(tmp_path, config, says):
    path = write_safetensors_model(tmp_path / "m")
    write_json(path / "config.json", tiny_config() | config)
    refuses(path, says)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_json_nested_without_end(tmp_path, name):
    path = write_safetensors_model(tmp_path / "m")
    (path / name).write_text('{"a": ' + "[" * 100_000)
    refuses(path, "cannot be read")


def with_header(path, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": ' + b"[" * 100_000,
        {"a": {"dtype": "F32", "shape": "aaaa", "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"a": {"dtype": [], "shape": [], "data_offsets": [0, 0]}},
        [1],
    ],
)
def test_safetensors_headers_that_are_none(tmp_path, header):
    path = write_safetensors_model(tmp_path / "m")
    with_header(path, header)
    refuses(path, "header is damaged")


def test_what_safetensors_itself_refuses_is_told(tmp_path):
    path = write_safetensors_model(tmp_path / "m")
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0" * 8)  # bytes that no tensor has
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        list(open_checkpoint(path).weights())


@pytest.mark.parametrize(
    "place", ["../m/model.safetensors", "/etc/passwd", "..", "a/b", "\0", "", "x" * 5000]
)
def test_an_index_names_files_of_its_own_directory_only(tmp_path, place):
    path = write_safetensors_model(tmp_path / "m")
    (path / "model.safetensors").rename(tmp_path / "outside.safetensors")
    write_json(path / "model.safetensors.index.json", {"weight_map": {"a": place}})
    refuses(path, "named in the index, is missing")


def test_a_remote_code_config_runs_nothing(tmp_path):
    path = write_safetensors_model(tmp_path / "m")
    (path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    evil = {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}, "trust_remote_code": True}
    write_json(path / "config.json", tiny_config() | evil)
    assert open_checkpoint(path).config.num_layers == 2


@pytest.mark.parametrize("name", ["x" * 5000, "\0", "\ud800", "~nobody-of-this-name/m"])
def test_a_model_s_name_that_no_file_can_have(name):
    with pytest.raises(ModelError, match=r"no model|no such file"):
        resolve(name)


class Panic(BaseException):
    """As pyo3's: no Exception."""


def test_a_panic_of_the_library_is_an_error(tmp_path, monkeypatch):
    def panics(*arguments, **options):
        raise Panic("index out of bounds\nat src/lib.rs")

    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    monkeypatch.setattr(tokenizer, "_backend", type("", (), {"decode_batch": panics})())
    with pytest.raises(ModelError, match=r"cannot decode an answer: index out of bounds$"):
        tokenizer.decode_batch([np.array([1])])
    monkeypatch.setattr(tokenizers.Tokenizer, "from_file", panics)
    with pytest.raises(ModelError, match=r"not a tokenizer: index out of bounds$"):
        Tokenizer.from_directory(tmp_path)


def test_an_interrupt_is_no_failure_of_the_library(monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "_backend", type("", (), {"decode_batch": interrupted})())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.decode_batch([np.array([1])])


def test_a_template_of_special_tokens_without_one_of_them_cuts_nothing(tmp_path):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "lost", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {},
    }
    path.write_text(json.dumps(tree))
    tokenizer = Tokenizer.from_directory(tmp_path)
    texts = ["a" * 100 + " b", "a" * 100 + " c"]
    with suppress(ModelError):  # it may fail, but with nothing else
        assert len(tokenizer.encode_batch(texts, add_special_tokens=False)) == 2


def test_the_longest_token_is_known_of_byte_level_vocabularies_only():
    backend = tiny_tokenizer()._backend
    assert longest_token(backend) == len("<|endoftext|>")
    backend.normalizer = tokenizers.normalizers.NFC()
    assert longest_token(backend) is None
    backend.normalizer = None
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    assert longest_token(backend) is None
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    assert longest_token(backend) == len("<|endoftext|>")
    backend.add_tokens([tokenizers.AddedToken("<x>", rstrip=True)])
    assert longest_token(backend) is None


def test_a_token_s_id_far_beyond_the_others_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["vocab"]["hell"] = 2**31 - 1
    path.write_text(json.dumps(tree))
    with pytest.raises(ModelError, match="the id 2,147,483,647, though there are only 270 tokens"):
        Tokenizer.from_directory(tmp_path)
