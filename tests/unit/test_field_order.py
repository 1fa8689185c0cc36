"""The order of fields in prompts: the same object, the same order in every window, more shared."""

import datetime
import json

import numpy as np
import pyarrow as pa
import pytest
from builders import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import UsageError
from batchllm.prefix.plan import plan_tokens
from batchllm.report.advice import advise
from batchllm.request import SamplingParams
from batchllm.text.field_order import learn_column_rules, learn_field_order, spread
from batchllm.text.field_values import printed_values
from batchllm.text.prompts import PromptBuilder, PromptSpec

TOKENIZER = tiny_tokenizer(chat_template=None)
OBJECT = "{{ row | tojson }}"
DAY = datetime.date(2024, 1, 1)
CELLS = {
    "text": (pa.string(), st.sampled_from(["a", "b" * 40, 'quo"te', "é", None])),
    "coded": (pa.dictionary(pa.int8(), pa.string()), st.sampled_from(["x", "y" * 30, None])),
    "number": (pa.int16(), st.sampled_from([1, 2, None])),
    "real": (pa.float64(), st.sampled_from([0.5, -0.0, 0.0])),
    "day": (pa.date32(), st.sampled_from([DAY, DAY + datetime.timedelta(1)])),
    "tags": (pa.list_(pa.string()), st.lists(st.sampled_from("pq"), max_size=2)),
}


@st.composite
def random_tables(draw):
    rows = draw(st.integers(1, 40))
    return pa.table(
        {
            name: pa.array(draw(st.lists(cells, min_size=rows, max_size=rows)), pa.string())
            .dictionary_encode()
            .cast(kind)
            if pa.types.is_dictionary(kind)
            else pa.array(draw(st.lists(cells, min_size=rows, max_size=rows)), kind)
            for name, (kind, cells) in CELLS.items()
        }
    )


def prompts(table, rules, template=OBJECT, reorder_fields=True):
    spec = PromptSpec(template=template, reorder_fields=reorder_fields)
    batch = PromptBuilder(spec, TOKENIZER, 10_000, field_rules=rules).build(table)
    assert not batch.errors
    return TOKENIZER.decode_batch([batch.tokens[row] for row in range(table.num_rows)])


def movies(rows=600, seed=0):
    """Half the rows share a movie's text, the other half a critic's."""
    rng = np.random.default_rng(seed)
    movie, critic = rng.integers(8, size=rows), rng.integers(8, size=rows)
    by_movie = rng.random(rows) < 0.5
    columns = {
        "review": [f"review number {i}" for i in range(rows)],
        "movie": [
            f"m{m if b else 1000 + i}" for i, (m, b) in enumerate(zip(movie, by_movie, strict=True))
        ],
        "critic": [
            f"c{1000 + i if b else c}"
            for i, (c, b) in enumerate(zip(critic, by_movie, strict=True))
        ],
    }
    columns["plot"] = [f"{name} is a long story, " * 4 for name in columns["movie"]]
    columns["life"] = [f"{name} wrote much, " * 4 for name in columns["critic"]]
    return pa.table(columns)


@settings(max_examples=60)
@given(random_tables(), st.integers(1, 9), st.integers(1, 40))
def test_windows_have_the_orders_of_the_whole_and_objects_their_fields(table, size, learned):
    rules = learn_column_rules(table.slice(0, learned), table.column_names, table.num_rows)
    whole = prompts(table, rules)
    pieces = [table.slice(start, size) for start in range(0, table.num_rows, size)]
    assert [text for piece in pieces for text in prompts(piece, rules)] == whole
    plain = prompts(table, None, reorder_fields=False)
    assert [json.loads(text) for text in whole] == [json.loads(text) for text in plain]
    assert all(list(json.loads(text)) == table.column_names for text in plain)
    orders = rules.orders(table)
    assert [tuple(json.loads(text)) for text in whole] == orders


def test_each_row_begins_with_what_it_shares():
    table = movies()
    rules = learn_column_rules(table, table.column_names)
    for row, text in zip(table.to_pylist(), prompts(table, rules), strict=True):
        first = "movie" if len(row["movie"]) == 2 else "critic"
        assert text.startswith(f'{{"{first}": '), text
    some = '{{ row["review", "life", "plot"] | tojson }}'
    for row, text in zip(
        table.to_pylist(), prompts(table, learned(table, some), some), strict=True
    ):
        first = "plot" if len(row["movie"]) == 2 else "life"
        assert text.startswith(f'{{"{first}": '), text
        assert sorted(json.loads(text)) == ["life", "plot", "review"]


def learned(table, template=OBJECT):
    spec = PromptSpec(template=template, reorder_fields=True)
    return learn_field_order(spec, [table], table.num_rows)


def test_reordered_prompts_share_more():
    table = movies()

    def computed(texts):
        tokens = TOKENIZER.encode_batch(texts, add_special_tokens=False)
        return plan_tokens(tokens, [SamplingParams()]).tree.num_distinct_prefixes / len(
            tokens.values
        )

    reordered = computed(prompts(table, learned(table)))
    assert reordered < 0.75 * computed(prompts(table, None))


def test_learning_is_from_rows_spread_over_the_table_however_it_is_cut():
    table = movies(1000)
    spec = PromptSpec(template=OBJECT, reorder_fields=True)
    expected = learn_field_order(spec, [table], 1000).orders(table)
    for size in (1, 7, 999):
        pieces = (table.slice(start, size) for start in range(0, 1000, size))
        assert learn_field_order(spec, pieces, 1000).orders(table) == expected
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, 4).tolist() == [0, 1, 2]
    assert spread(0, 4).tolist() == []
    assert learn_field_order(spec, [], 0) is None
    unused = (_ for _ in [pytest.fail])
    assert learn_field_order(PromptSpec(template=OBJECT), unused, 1000) is None
    assert next(unused) is pytest.fail  # nothing was read


def test_only_the_spread_rows_are_learned_from():
    spec = PromptSpec(template=OBJECT, reorder_fields=True)
    table = movies(1000)
    other = table.set_column(0, "review", pa.array(["the same review " * 20] * 1000))
    rows = spread(1000, 100)
    mixed = pa.concat_tables([table, other]).take(
        [i if i in set(rows.tolist()) else 1000 + i for i in range(1000)]
    )
    sample = learn_column_rules(table.take(rows), table.column_names, 1000).orders(table)
    for learned_from in (table, mixed):
        pieces = (learned_from.slice(start, 64) for start in range(0, 1000, 64))
        rules = learn_field_order(spec, pieces, 1000, learning_rows=100)
        assert rules.orders(table) == sample
    assert learn_field_order(spec, [mixed], 1000).orders(mixed) != rules.orders(mixed)


def test_values_that_print_alike_are_equal_and_bad_text_is_a_value():
    raw = pa.array([b"ok", b"\xff\xfe", b"the", None], pa.binary())
    text = pa.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    column = pa.chunked_array([text])
    printed = printed_values(column)
    assert printed.null_count == 0 and len(printed.dictionary_encode().dictionary) == 4
    rules = learn_column_rules(pa.table({"t": column, "n": [1, 1, 1, 1]}), ["t", "n"])
    assert rules.orders(pa.table({"t": column, "n": [1, 1, 1, 1]})) == [("n", "t")] * 4
    nested = pa.chunked_array([[["a"], None], [["a"]]])
    assert printed_values(nested).to_pylist() == ["['a']", "None", "['a']"]


@pytest.mark.parametrize(
    "spec",
    [{"prompt_column": "a"}, {"template": "{{ a }}"}, {"template": '{{ row["a"] | tojson }}'}],
)
def test_without_an_object_there_is_nothing_to_reorder(spec):
    with pytest.raises(UsageError, match=r"no fields to reorder.*\{\{ row \| tojson \}\}"):
        PromptSpec(**spec, reorder_fields=True)


def test_all_columns_are_checked():
    twice = pa.table([[1], [2]], names=["a", "a"])
    with pytest.raises(UsageError, match="2 columns"):
        PromptSpec(template=OBJECT).check(twice.schema)
    with pytest.raises(UsageError, match="nothing"):
        PromptSpec(template="{{ nothing }}" + OBJECT).check(movies(1).schema)


def test_advice_names_the_option_where_it_would_help():
    table = movies()
    (advice,) = advise(table, PromptSpec(template=OBJECT))
    assert "--reorder-fields" in advice and "answers can change" in advice
    assert advise(table, PromptSpec(template=OBJECT, reorder_fields=True)) == []
    assert advise(table, PromptSpec(template="{{ review }}" + OBJECT)) == []  # nothing behind it
    assert advise(table, PromptSpec(template='{{ row["movie", "review"] | tojson }}')) == []
    assert advise(table.slice(0, 0), PromptSpec(template=OBJECT)) == []
    assert advise(table, PromptSpec(prompt_column="review")) == []
    (prose,) = advise(table, PromptSpec(template="{{ review }} {{ plot }}"))
    assert prose.startswith("review comes first")
