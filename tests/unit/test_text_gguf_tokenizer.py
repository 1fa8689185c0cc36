"""Tokenizers out of GGUF metadata, held against ids worked out by hand from llama.cpp's rules."""

import numpy as np
import pytest
from builders import byte_level_metadata, byte_level_tokens, sentencepiece_metadata

from batchllm.errors import ModelError
from batchllm.text.gguf_tokenizer import gguf_special_ids, tokenizer_from_gguf


def pieces(metadata, text, *, special=False):
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = tokenizer_from_gguf(metadata).encode_batch([text], add_special_tokens=special)[0]
    return [tokens[i] for i in ids]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        # smollm cuts every digit off first, so the empty line before one stays a whole token.
        ("smollm", "123", ["1", "2", "3"]),
        ("smollm", "a\n\n1", ["a", "ĊĊ", "1"]),
        ("smollm", "a  1", ["a", "ĠĠ", "1"]),
        ("gpt-2", "123", ["123"]),
        ("gpt-2", "a\n\n1", ["a", "Ċ", "Ċ", "1"]),
        ("gpt-2", "a  1", ["a", "Ġ", "Ġ", "1"]),
        # Llama 3 keeps three digits together, Qwen 2 one.
        ("llama-bpe", "1123", ["1", "12", "3"]),
        ("llama-bpe", "123", ["123"]),
        ("qwen2", "123", ["1", "2", "3"]),
        ("llama-bpe", "a\n\n1", ["a", "ĊĊ", "1"]),
        ("smollm", "hello the", ["hello", "Ġthe"]),
        ("gpt-2", "½", ["Â", "½"]),
    ],
)
def test_pre_tokenizers(pre, text, expected):
    metadata = byte_level_metadata(pre=pre)
    assert pieces(metadata, text) == expected
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.decode_batch(
        list(tokenizer.encode_batch([text], add_special_tokens=False))
    ) == [text]


def test_only_llama3_takes_whole_words_without_merging():
    tokens = [*byte_level_tokens(), "xyz"]  # no merge makes it
    types = np.array([3] * 3 + [1] * (len(tokens) - 3), dtype=np.int32)
    for pre, expected in (("llama-bpe", ["xyz"]), ("qwen2", ["x", "y", "z"])):
        metadata = byte_level_metadata(pre=pre, tokens=tokens, token_type=types)
        assert pieces(metadata, "xyz") == expected


def test_bos_by_family_and_by_flag():
    def first(**changes):
        metadata = byte_level_metadata(**changes)
        return pieces({k: v for k, v in metadata.items() if v is not None}, "h", special=True)

    assert first(pre="llama-bpe", add_bos_token=None) == ["<|im_start|>", "h"]
    assert first(pre="smollm", add_bos_token=None) == ["h"]
    assert first(pre="smollm", add_bos_token=True) == ["<|im_start|>", "h"]
    assert first(pre="llama-bpe", add_bos_token=False, add_eos_token=True) == ["h", "<|im_end|>"]


def test_control_tokens_are_special_and_user_defined_ones_are_whole():
    tokens = [*byte_level_tokens(), "<think>"]
    types = np.array([3] * 3 + [1] * (len(tokens) - 4) + [4], dtype=np.int32)
    metadata = byte_level_metadata(tokens=tokens, token_type=types)
    text = "<|im_start|>h<think>"
    assert pieces(metadata, text) == ["<|im_start|>", "h", "<think>"]
    tokenizer = tokenizer_from_gguf(metadata)
    ids = list(tokenizer.encode_batch([text], add_special_tokens=False))
    assert tokenizer.decode_batch(ids) == ["h<think>"]


def test_end_tokens_are_the_named_one_and_the_known_ones():
    assert gguf_special_ids(byte_level_metadata()).end_of_generation == (0, 2)
    # The same texts as normal tokens end nothing; ids named by key do.
    normal = byte_level_metadata(
        token_type=np.ones(len(byte_level_tokens()), np.int32), eot_token_id=7, eom_token_id=9
    )
    assert gguf_special_ids(normal).end_of_generation == (2, 7, 9)
    assert tokenizer_from_gguf(byte_level_metadata()).eos_token_ids == (0, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", ["▁hell", "o"]),  # "he" goes before "el", then "ll" before "lo"
        ("ell", ["▁", "el", "l"]),  # without an h, "el" is the best
        ("1\n", ["▁", "1", "<0x0A>"]),  # bytes for what has no token
        ("½", ["▁", "<0xC2>", "<0xBD>"]),
        (" h", ["▁", "▁", "h"]),
        ("</s>h", ["</s>", "▁", "h"]),  # the space comes after a special token again
        ("<0x0A>", ["▁", "<", "<0x30>", "<0x78>", "<0x30>", "<0x41>", ">"]),
    ],
)
def test_sentencepiece(text, expected):
    assert pieces(sentencepiece_metadata(), text) == expected


def test_sentencepiece_never_merges_into_a_byte_token():
    metadata = sentencepiece_metadata()
    parts = ["0", "x", "4", "<0", "<0x", "<0x4", "1>"]  # the last two would make <0x41>
    for key, values in (("tokens", parts), ("scores", [-1.0] * 7), ("token_type", [1] * 7)):
        metadata[f"tokenizer.ggml.{key}"] = [*metadata[f"tokenizer.ggml.{key}"], *values]
    assert pieces(metadata, "<0x41>") == ["▁", "<0x4", "1>"]


def test_sentencepiece_adds_bos_and_a_space_unless_told_otherwise():
    assert pieces(sentencepiece_metadata(), "h", special=True) == ["<s>", "▁", "h"]
    without = sentencepiece_metadata(add_space_prefix=False, add_bos_token=False)
    assert pieces(without, "h", special=True) == ["h"]


@pytest.mark.parametrize("add_space", [True, False])
def test_sentencepiece_decodes_what_it_encoded(add_space):
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata(add_space_prefix=add_space))
    texts = ["hello world", "  two", "½\n", "h"]
    assert tokenizer.decode_batch(list(tokenizer.encode_batch(texts, add_special_tokens=True))) == (
        texts
    )


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (byte_level_metadata(model="t5"), "'t5' is not supported; use the model's safetensors"),
        (byte_level_metadata(pre="tekken"), "'tekken' is not supported .* safetensors directory"),
        (byte_level_metadata(tokens=[]), "no vocabulary"),
        (byte_level_metadata(token_type=np.ones(3, np.int32)), "3 token types"),
        (byte_level_metadata(eos_token_id=9999), "9999, outside the vocabulary"),
        (byte_level_metadata(merges=["x nothere"]), "damaged"),
        (byte_level_metadata(merges=["x"]), "damaged"),
        (sentencepiece_metadata(scores=np.zeros(3, np.float32)), "score"),
        (sentencepiece_metadata(bos_token_id=9999), "9999"),
    ],
)
def test_what_cannot_be_built_says_the_way_out(metadata, says):
    with pytest.raises(ModelError, match=says) as caught:
        tokenizer_from_gguf(metadata)
    assert "\n" not in str(caught.value)
