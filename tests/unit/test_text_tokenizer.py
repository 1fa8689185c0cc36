"""Tokenizer: ragged batches, special tokens where asked, and what is read from a directory."""

import json

import numpy as np
import pytest
from builders import (
    CHATML,
    tiny_backend,
    tiny_tokenizer,
    write_gguf_model,
    write_json,
    write_safetensors_model,
    write_tokenizer,
)

from batchllm.errors import ModelError
from batchllm.models.checkpoint import open_checkpoint
from batchllm.text import tokenizer as module
from batchllm.text.tokenizer import Tokenizer

TEXTS = ["hello the 123", "", "日本語 ½", "<|im_start|>user", "a\n\nb", "hello the 123"]


def test_batch_equals_one_by_one():
    backend, tokenizer = tiny_backend(), tiny_tokenizer()
    batch = tokenizer.encode_batch(TEXTS, add_special_tokens=False)
    assert batch.values.dtype == np.int32
    assert batch.offsets.dtype == np.int64
    assert [ids.tolist() for ids in batch] == [
        backend.encode(text, add_special_tokens=False).ids for text in TEXTS
    ]


def test_no_texts():
    batch = tiny_tokenizer().encode_batch([], add_special_tokens=False)
    assert len(batch) == 0
    assert batch.values.dtype == np.int32


@pytest.mark.parametrize(("texts", "chars"), [(2, 10**9), (10**9, 5), (1, 1)])
def test_cutting_into_batches_changes_nothing(monkeypatch, texts, chars):
    whole = tiny_tokenizer().encode_batch(TEXTS, add_special_tokens=False)
    monkeypatch.setattr(module, "_BATCH_TEXTS", texts)
    monkeypatch.setattr(module, "_BATCH_CHARS", chars)
    cut = tiny_tokenizer().encode_batch(TEXTS, add_special_tokens=False)
    np.testing.assert_array_equal(cut.values, whole.values)
    np.testing.assert_array_equal(cut.offsets, whole.offsets)


def test_decode_leaves_special_tokens_out_and_keeps_spaces():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode_batch([" the hello<|im_end|>", "½"], add_special_tokens=False)
    assert tokenizer.decode_batch(list(ids)) == [" the hello", "½"]


def test_decode_of_half_a_character_does_not_fail():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode_batch(["½"], add_special_tokens=False)[0]
    assert tokenizer.decode_batch([ids[:1]]) == ["\ufffd"]


def test_truncation_and_padding_in_the_file_are_off(tmp_path):
    write_tokenizer(tmp_path)
    backend = tiny_backend()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    batch = Tokenizer.from_directory(tmp_path).encode_batch(["abcdef"], add_special_tokens=True)
    assert batch.lengths.tolist() == [6]


@pytest.mark.parametrize(
    ("switches", "around"),
    [
        ({}, ([], [])),
        ({"add_bos_token": True}, ([1], [])),
        ({"add_bos_token": True, "add_eos_token": True}, ([1], [2])),
        ({"add_bos_token": False}, ([], [])),
    ],
)
def test_bos_and_eos_only_where_asked(tmp_path, switches, around):
    write_tokenizer(tmp_path, **switches)
    tokenizer = Tokenizer.from_directory(tmp_path)
    bare = tokenizer.encode_batch(["hello"], add_special_tokens=False)[0].tolist()
    full = tokenizer.encode_batch(["hello"], add_special_tokens=True)[0].tolist()
    assert full == around[0] + bare + around[1]


def test_directory_gives_tokens_template_and_end(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.chat_template == CHATML
    assert Tokenizer.from_directory(tmp_path, eos_token_ids=(0, 2)).eos_token_ids == (0, 2)


def test_chat_template_sources(tmp_path):
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    write_tokenizer(tmp_path, chat_template=named)
    assert Tokenizer.from_directory(tmp_path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_directory(tmp_path).chat_template == "file"
    (tmp_path / "chat_template.jinja").unlink()
    write_tokenizer(tmp_path, chat_template=None)
    assert Tokenizer.from_directory(tmp_path).chat_template is None


def test_vocab_size_is_past_the_highest_id(tmp_path):
    write_tokenizer(tmp_path)
    before = Tokenizer.from_directory(tmp_path).vocab_size
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text())
    values["added_tokens"].append(values["added_tokens"][0] | {"id": before + 0, "content": "<x>"})
    write_json(file, values)
    assert Tokenizer.from_directory(tmp_path).vocab_size == before + 1


def test_fingerprint_tells_tokenizers_apart(tmp_path):
    write_tokenizer(tmp_path)
    first = Tokenizer.from_directory(tmp_path).fingerprint
    assert Tokenizer.from_directory(tmp_path).fingerprint == first
    assert Tokenizer.from_directory(tmp_path, eos_token_ids=(0,)).fingerprint != first
    write_tokenizer(tmp_path, chat_template="other")
    assert Tokenizer.from_directory(tmp_path).fingerprint != first
    write_tokenizer(tmp_path, add_bos_token=True)
    assert Tokenizer.from_directory(tmp_path).fingerprint != first


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer_config.json", "{", "cannot be read"),
        ("tokenizer_config.json", "[]", "not a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat template"),
        ("tokenizer_config.json", '{"bos_token": "<x>", "add_bos_token": true}', "<x>"),
    ],
)
def test_damaged_directories(tmp_path, file, content, says):
    write_tokenizer(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=says) as caught:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [write_safetensors_model, write_gguf_model])
def test_a_checkpoint_builds_its_tokenizer_once(tmp_path, write):
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf"))
    assert checkpoint.tokenizer() is checkpoint.tokenizer()
