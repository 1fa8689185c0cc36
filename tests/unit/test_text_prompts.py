"""Prompts from tables: what is refused before anything runs, and what costs one row."""

import json

import numpy as np
import pyarrow as pa
import pytest
from builders import tiny_tokenizer

from batchllm.errors import UsageError
from batchllm.text.prompts import PromptBuilder, PromptSpec

TOKENIZER = tiny_tokenizer()
PLAIN = tiny_tokenizer(chat_template=None)
HEADER = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def build(table, tokenizer=PLAIN, max_model_len=100, **spec):
    spec = PromptSpec(**spec)
    spec.check(table.schema)
    return PromptBuilder(spec, tokenizer, max_model_len).build(table)


def prompts(table, tokenizer=PLAIN, **spec):
    """The prompts as text again, special tokens visible; errors as their codes."""
    batch = build(table, tokenizer, **spec)
    texts = [
        tokenizer._backend.decode(ids.tolist(), skip_special_tokens=False) for ids in batch.tokens
    ]
    for row, error in batch.errors.items():
        assert texts[row] == ""
        texts[row] = error.code
    return texts


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({}, "no prompt is given; give one of: a prompt column"),
        ({"prompt_column": "a", "template": "{{ a }}"}, "prompt column and a template exclude"),
        ({"template": " "}, "empty"),
        ({"template": "{a}"}, r"\{\{ a \}\}"),
        ({"messages_column": "m", "chat": False}, "chat is switched off"),
        ({"token_ids_column": "t", "chat": True}, "token ids are taken as they are"),
        ({"token_ids_column": "t", "system": "s"}, "system message needs a chat"),
        ({"prompt_column": "a", "system": "s", "chat": False}, "system message needs a chat"),
    ],
)
def test_specs_that_make_no_sense(spec, says):
    with pytest.raises(UsageError, match=says):
        PromptSpec(**spec)


SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "large": pa.large_string(),
        "coded": pa.dictionary(pa.int8(), pa.string()),
        "number": pa.int64(),
        "real": pa.float64(),
        "ids": pa.list_(pa.int32()),
        "wide": pa.large_list(pa.uint64()),
        "texts": pa.list_(pa.string()),
        "chat": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "half": pa.list_(pa.struct({"role": pa.string()})),
    }
)


@pytest.mark.parametrize(
    "spec",
    [
        {"prompt_column": "prompt"},
        {"prompt_column": "large"},
        {"prompt_column": "coded"},
        {"token_ids_column": "ids"},
        {"token_ids_column": "wide", "max_tokens_column": "number"},
        {"messages_column": "chat"},
        {"messages_column": "prompt"},
        {"template": "{{ number }} {{ row['texts'] }}"},
    ],
)
def test_columns_that_will_do(spec):
    PromptSpec(**spec).check(SCHEMA)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"prompt_column": "promt"}, "prompt column 'promt' .* did you mean 'prompt'"),
        ({"prompt_column": "zzz"}, "columns: prompt, large"),
        ({"prompt_column": "number"}, "'number' has type int64; it must be text"),
        ({"token_ids_column": "texts"}, "list of integers"),
        ({"token_ids_column": "number"}, "list of integers"),
        ({"messages_column": "half"}, "role and content"),
        ({"messages_column": "ids"}, "role and content"),
        ({"template": "{{ numbr }}"}, "template column 'numbr' .* did you mean 'number'"),
        ({"prompt_column": "prompt", "max_tokens_column": "real"}, "max-tokens column 'real'"),
        ({"prompt_column": "prompt", "max_tokens_column": "n"}, "max-tokens column 'n'"),
    ],
)
def test_columns_that_will_not(spec, says):
    with pytest.raises(UsageError, match=says):
        PromptSpec(**spec).check(SCHEMA)


def test_a_column_that_occurs_twice_is_refused():
    with pytest.raises(UsageError, match="2 columns"):
        PromptSpec(prompt_column="a").check(pa.schema([("a", pa.string()), ("a", pa.string())]))


def test_needed_columns():
    spec = PromptSpec(template="{{ b }}{{ a }}{{ row['c d'] }}", max_tokens_column="b")
    assert spec.columns_of(SCHEMA) == ("b", "a", "c d")
    spec = PromptSpec(messages_column="m", max_tokens_column="n")
    assert spec.columns_of(SCHEMA) == ("m", "n")
    spec = PromptSpec(template='{{ row["real", "ids"] | tojson }}', max_tokens_column="number")
    assert spec.columns_of(SCHEMA) == ("real", "ids", "number")
    spec = PromptSpec(template="{{ row | tojson }}")
    assert spec.columns_of(SCHEMA) == tuple(SCHEMA.names)


@pytest.mark.parametrize(
    "spec",
    [
        {"messages_column": "m"},
        {"prompt_column": "p", "chat": True},
        {"prompt_column": "p", "system": "s"},
    ],
)
def test_a_chat_needs_a_model_with_a_template(spec):
    with pytest.raises(UsageError, match="the model has no chat template, which is needed for"):
        PromptBuilder(PromptSpec(**spec), PLAIN, 100)


def test_a_broken_chat_template_can_be_switched_off():
    broken = tiny_tokenizer(chat_template="{% if %}")
    with pytest.raises(UsageError, match="switch chat off"):
        PromptBuilder(PromptSpec(prompt_column="p"), broken, 100)
    PromptBuilder(PromptSpec(prompt_column="p", chat=False), broken, 100)


def test_text_is_a_chat_where_the_model_has_one():
    table = pa.table({"p": ["hi"]})
    assert prompts(table, TOKENIZER, prompt_column="p") == [HEADER]
    assert prompts(table, TOKENIZER, prompt_column="p", chat=False) == ["hi"]
    assert prompts(table, PLAIN, prompt_column="p") == ["hi"]
    with_system = "<|im_start|>system\nbe\nbrief<|im_end|>\n" + HEADER
    assert prompts(table, TOKENIZER, prompt_column="p", system="be\nbrief") == [with_system]
    assert prompts(table, TOKENIZER, template="{{ p }}") == [HEADER]


def test_a_rendered_chat_gets_no_second_bos_and_plain_text_gets_one():
    from batchllm.text.tokenizer import add_bos_and_eos

    tokenizer = tiny_tokenizer()
    add_bos_and_eos(tokenizer._backend, "<|im_start|>", None)
    table = pa.table({"p": ["hi"]})
    assert prompts(table, tokenizer, prompt_column="p") == [HEADER]
    assert prompts(table, tokenizer, prompt_column="p", chat=False) == ["<|im_start|>hi"]


def test_rows_keep_their_order_and_repeats_their_tokens():
    texts = ["hello", "the", "hello", "12", "the", "hello"]
    for column in (
        pa.array(texts),
        pa.array(texts).dictionary_encode(),
        pa.chunked_array([texts[:2], texts[2:]]),
    ):
        assert prompts(pa.table({"p": column}), prompt_column="p") == texts


def test_bad_text_costs_its_row():
    table = pa.table({"p": ["ok", None, "", "x" * 100, "x" * 99]})
    batch = build(table, prompt_column="p")
    assert {row: error.code for row, error in batch.errors.items()} == {
        1: "null_prompt",
        2: "empty_prompt",
        3: "prompt_too_long",
    }
    assert batch.tokens.lengths.tolist() == [2, 0, 0, 0, 99]
    assert "100 tokens" in batch.errors[3].message
    assert "length of 100" in batch.errors[3].message


def test_text_that_is_not_utf8_costs_its_row():
    raw = pa.array([b"ok", b"\xff\xfe", b"the"]).cast(pa.binary())
    column = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    assert prompts(pa.table({"p": column}), prompt_column="p") == ["ok", "invalid_utf8", "the"]


def test_a_template_that_fails_costs_its_row():
    table = pa.table({"a": ["x", None, "z"], "b": [1, 2, 0], "unused": [None] * 3})
    batch = build(table, template="{{ a }}{{ 6 // b }}")
    assert {row: error.code for row, error in batch.errors.items()} == dict.fromkeys(
        (1, 2), "template_error"
    )
    assert "null" in batch.errors[1].message
    assert prompts(table, template="{{ a }}{{ 6 // b }}")[0] == "x6"


def test_error_messages_are_one_line_of_bounded_length():
    table = pa.table({"m": [json.dumps([{"role": "user", "content": "x\n" * 1000}])]})
    shouting = tiny_tokenizer(chat_template="{{ raise_exception(messages[0].content) }}")
    (error,) = build(table, shouting, messages_column="m").errors.values()
    assert error.code == "template_error"
    assert error.message.startswith("the chat template: x x x")
    assert len(error.message) <= 301


def test_a_template_without_columns_gives_a_prompt_a_row():
    assert prompts(pa.table({"a": [1, 2]}), template="hi") == ["hi", "hi"]


GOOD = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("as_json", [False, True])
def test_messages(as_json):
    rows = [
        GOOD,
        [{"role": "system", "content": "s"}, *GOOD],
        None,
        [],
        [{"role": "user", "content": None}],
        [{"role": None, "content": "x"}],
    ]
    kind = pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "name": pa.string()}))
    column = pa.array(rows, kind)
    if as_json:
        column = pa.array([None if row is None else json.dumps(row) for row in rows])
    table = pa.table({"m": column})
    system = "<|im_start|>system\ns<|im_end|>\n" + HEADER
    bad = ["null_prompt", *["invalid_messages"] * 3]
    assert prompts(table, TOKENIZER, messages_column="m") == [HEADER, system, *bad]
    # The job's system message is for rows that bring none.
    default = "<|im_start|>system\nd<|im_end|>\n" + HEADER
    assert prompts(table, TOKENIZER, messages_column="m", system="d") == [default, system, *bad]


@pytest.mark.parametrize(
    ("cell", "code"),
    [
        ("not json", "invalid_messages"),
        ('{"role": "user"}', "invalid_messages"),
        ('["x"]', "invalid_messages"),
        ('[{"role": "user", "content": 3}]', "invalid_messages"),
        ('[{"role": "user", "content": ["part"]}]', "template_error"),
        ('[{"role": "user", "content": "\\ud800"}]', "invalid_utf8"),
        ("[" * 100_000, "invalid_messages"),
    ],
)
def test_json_that_is_no_conversation(cell, code):
    table = pa.table({"m": [json.dumps(GOOD), cell, json.dumps(GOOD)]})
    assert prompts(table, TOKENIZER, messages_column="m") == [HEADER, code, HEADER]


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.uint64()), pa.list_(pa.uint8())],
)
def test_token_ids(kind):
    rows = [[5, 6, 7], None, [], [1], [8, None, 9], [2, 3]]
    whole = pa.array([[250], *rows], kind)
    for column in (
        pa.array(rows, kind),
        whole.slice(1),
        pa.chunked_array([whole.slice(1, 2), whole.slice(3)]),
    ):
        batch = build(pa.table({"t": column}), TOKENIZER, token_ids_column="t")
        assert [ids.tolist() for ids in batch.tokens] == [[5, 6, 7], [], [], [1], [], [2, 3]]
        assert {row: error.code for row, error in batch.errors.items()} == {
            1: "null_prompt",
            2: "empty_prompt",
            4: "invalid_token_ids",
        }
        assert batch.tokens.values.dtype == np.int32
        assert batch.tokens.offsets.dtype == np.int64


def test_fixed_size_token_ids():
    column = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2))
    batch = build(pa.table({"t": column}), token_ids_column="t")
    assert [ids.tolist() for ids in batch.tokens] == [[1, 2], [], [3, 4]]
    assert batch.errors[1].code == "null_prompt"


def test_token_ids_outside_the_vocabulary():
    size = TOKENIZER.vocab_size
    rows = [[size - 1], [1, size], [-1], [2**40], [3]]
    batch = build(pa.table({"t": rows}), TOKENIZER, token_ids_column="t")
    assert sorted(batch.errors) == [1, 2, 3]
    assert {error.code for error in batch.errors.values()} == {"invalid_token_ids"}
    assert f"token id {size} " in batch.errors[1].message
    assert f"{2**40}" in batch.errors[3].message
    assert [ids.tolist() for ids in batch.tokens] == [[size - 1], [], [], [], [3]]


def test_text_whose_tokens_the_model_lacks_costs_its_row():
    table = pa.table({"p": ["hello", "h"]})
    builder = PromptBuilder(PromptSpec(prompt_column="p"), PLAIN, 100, vocab_size=259)
    batch = builder.build(table)
    assert batch.errors[0].code == "invalid_token_ids"
    assert batch.tokens.lengths.tolist() == [0, 1]


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.uint16()])
def test_max_tokens(kind):
    table = pa.table({"p": ["a", "b", "c"], "n": pa.array([7, None, 0], kind)})
    batch = build(table, prompt_column="p", max_tokens_column="n")
    assert batch.max_tokens.dtype == np.int32
    assert batch.max_tokens.tolist() == [7, 0, 0]
    assert {row: error.code for row, error in batch.errors.items()} == {2: "invalid_max_tokens"}
    assert batch.tokens.lengths.tolist() == [1, 1, 0]


def test_max_tokens_out_of_range():
    table = pa.table({"p": ["a", "b"], "n": [2**31, -5]})
    errors = build(table, prompt_column="p", max_tokens_column="n").errors
    assert [error.code for error in errors.values()] == ["invalid_max_tokens"] * 2
    assert "-5" in errors[1].message


def test_no_max_tokens_column_no_array():
    assert build(pa.table({"p": ["a"]}), prompt_column="p").max_tokens is None


@pytest.mark.parametrize(
    ("column", "spec"),
    [
        (pa.array([], pa.string()), {"prompt_column": "p"}),
        (pa.array([], pa.list_(pa.int32())), {"token_ids_column": "p"}),
        (pa.chunked_array([], pa.list_(pa.int32())), {"token_ids_column": "p"}),
        (pa.chunked_array([], pa.string()), {"template": "{{ p }}"}),
    ],
)
def test_an_empty_table(column, spec):
    batch = build(pa.table({"p": column}), **spec)
    assert len(batch.tokens) == 0
    assert batch.errors == {}
