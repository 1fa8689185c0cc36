"""Rows that Python, the tokenizer or memory cannot take: their own error, and the others go on."""

import datetime
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
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


@pytest.mark.parametrize("has_pandas", [True, False])
def test_nanoseconds_are_printed_alike_with_pandas_and_without(has_pandas):
    nano, exact = pa.timestamp("ns"), pa.array([0, 1000, None], pa.timestamp("ns"))
    kinds = {
        "plain": exact,
        "fine": pa.array([0, 1, None], nano),
        "zone": exact.cast(pa.timestamp("ns", "UTC")),
        "many": pa.array([[0], [1000], None], pa.list_(nano)),
        "two": pa.array([[0, 1000], None, [0, 0]], pa.list_(nano, 2)),
        "large": pa.array([[0], [1000], []], pa.large_list(nano)),
        "fields": pa.array([{"x": 1000}] * 3, pa.struct([("x", pa.duration("ns"))])),
        "map": pa.array([[("a", 1000)]] * 3, pa.map_(pa.string(), nano)),
        "words": exact.dictionary_encode(),
        "clock": pa.array([0, 1000, 1], pa.time64("ns")),
    }
    code = "\n".join(
        [
            "import sys",
            "" if has_pandas else "sys.modules['pandas'] = None",
            "import pyarrow as pa",
            "from batchllm.text.columns import python_values",
            "table = pa.ipc.open_stream(sys.stdin.buffer).read_all()",
            "errors = {}",
            "print([python_values(column, errors) for column in table.columns], errors)",
        ]
    )
    sink = pa.BufferOutputStream()
    table = pa.table(kinds)
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    run = [sys.executable, "-c", code]
    printed = subprocess.run(
        run, input=sink.getvalue().to_pybytes(), capture_output=True, check=True
    )
    assert b"Timestamp" not in printed.stdout and b"Timedelta" not in printed.stdout
    assert b"'1970-01-01 00:00:00.000000001'" in printed.stdout
    assert b"microseconds=1" in printed.stdout and printed.stdout.strip().endswith(b"{}")


def test_fields_of_dictionaries_that_arrow_cannot_decode_are_printed():
    for kind in (pa.string_view(), pa.binary_view(), pa.string()):
        values = pa.array(["a", "b"], pa.string()).cast(kind)
        column = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1]), values)
        printed = printed_values(pa.chunked_array([column])).to_pylist()
        assert printed[0] == printed[2] != printed[1]
