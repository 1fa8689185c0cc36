"""Rows that Python, the tokenizer or memory cannot take: their own error, and the others go on."""

import datetime

import numpy as np
import pyarrow as pa
from builders import tiny_tokenizer

from batchllm.errors import ModelError
from batchllm.text.field_values import printed_values
from batchllm.text.prompts import PromptBuilder, PromptSpec

NANOSECOND = 1


def build(table, spec, tokenizer=None, length=200):
    return PromptBuilder(spec, tokenizer or tiny_tokenizer(chat_template=None), length).build(table)


def test_a_text_that_the_tokenizer_fails_on_is_that_row_s_error(monkeypatch):
    tokenizer = tiny_tokenizer(chat_template=None)
    original = tokenizer.encode_batch

    def failing(texts, **options):
        if "bad" in texts:
            raise ModelError("the tokenizer fails on a text: boom")
        return original(texts, **options)

    monkeypatch.setattr(tokenizer, "encode_batch", failing)
    table = pa.table({"t": ["good", "bad", "better", "bad"]})
    batch = build(table, PromptSpec(prompt_column="t"), tokenizer)
    assert list(batch.errors) == [1, 3]
    assert str(batch.errors[1]) == "tokenizer_error: the tokenizer fails on a text: boom"
    expected = original(["good", "", "better", ""], add_special_tokens=True)
    assert np.array_equal(batch.tokens.values, expected.values)
    assert np.array_equal(batch.tokens.offsets, expected.offsets)


def test_a_text_far_too_long_is_not_tokenized(monkeypatch):
    tokenizer = tiny_tokenizer(chat_template=None)
    seen = []
    original = tokenizer.encode_batch
    monkeypatch.setattr(
        tokenizer, "encode_batch", lambda texts, **o: seen.extend(texts) or original(texts, **o)
    )
    longest = len("<|endoftext|>")
    texts = ["é" * 200 * longest, "<|endoftext|>" * 199, "<|endoftext|>" * 200, "x"]
    batch = build(pa.table({"t": texts}), PromptSpec(prompt_column="t"), tokenizer)
    assert [(row, error.code) for row, error in batch.errors.items()] == [
        (0, "prompt_too_long"),
        (2, "prompt_too_long"),
    ]
    assert "at least 400 tokens" in batch.errors[0].message
    assert texts[0] not in seen and texts[1] in seen
    assert batch.tokens.lengths.tolist() == [0, 199, 0, 1]


def test_times_that_python_has_not_are_text():
    times = pa.array([0, NANOSECOND, None], pa.timestamp("ns"))
    batch = build(pa.table({"when": times}), PromptSpec(template="{{ when }}"))
    assert list(batch.errors) == [2]
    far = pa.array([2**62], pa.int64()).cast(pa.timestamp("s"))
    errors = build(pa.table({"when": far}), PromptSpec(template="{{ when }}")).errors
    assert not errors or errors[0].code == "invalid_value"


def test_a_value_that_cannot_be_read_is_that_row_s_error():
    times = pa.array([[0], [NANOSECOND]], pa.list_(pa.timestamp("ns")))
    spec = PromptSpec(template="{% for x in t %}{{ x.year }}{% endfor %}")
    batch = build(pa.table({"t": times}), spec)
    assert list(batch.errors) == [1]
    assert batch.errors[1].code == "invalid_value"
    assert len(batch.tokens[0])
    assert datetime.MINYEAR == 1


def test_fields_of_dictionaries_that_arrow_cannot_decode_are_printed():
    for kind in (pa.string_view(), pa.binary_view(), pa.string()):
        values = pa.array(["a", "b"], pa.string()).cast(kind)
        column = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1]), values)
        printed = printed_values(pa.chunked_array([column])).to_pylist()
        assert printed[0] == printed[2] != printed[1]
