"""Windows: every wanted row once, prompts that share together, and the loss counted."""

import json

import numpy as np
import pyarrow as pa
import pytest
from builders import tiny_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import InMemory

from batchllm.prefix.tree import build_tree
from batchllm.request import RaggedTokens
from batchllm.text.prompts import PromptBuilder, PromptSpec
from batchllm.windows import Windows


@pytest.fixture(autouse=True)
def little(monkeypatch):
    """Samples of some rows, and runs on disk, in tables this small."""
    monkeypatch.setattr("batchllm.windows._SAMPLE_ROWS", 40)
    monkeypatch.setattr("batchllm.io.spool._BUDGET_BYTES", 300)


def distinct_tokens(prompts):
    good = [tokens for tokens in prompts if len(tokens)]
    if not good:
        return 0
    tokens = RaggedTokens.from_sequences(good)
    return build_tree(tokens, np.zeros(len(good), dtype=np.int64)).num_distinct_prefixes


def prompts(builder, windows):
    return [list(builder.build(window.rows.table).tokens) for window in windows]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    texts=st.lists(st.text("ab\n ", max_size=12) | st.none(), max_size=80),
    window_rows=st.integers(1, 30),
    data=st.data(),
)
def test_every_wanted_row_comes_once_and_the_loss_is_exact(tmp_path, texts, window_rows, data):
    wanted = np.array(data.draw(st.lists(st.booleans(), max_size=len(texts))), dtype=np.bool_)
    table = pa.table({"t": pa.array(texts, pa.string()), "other": range(len(texts))})
    builder = PromptBuilder(PromptSpec(prompt_column="t"), tiny_tokenizer(), 500)
    windows = Windows(
        InMemory(table), builder, wanted, window_rows=window_rows, scratch=tmp_path / "s"
    )
    found = list(windows)
    windows.close()
    assert not (tmp_path / "s").exists()
    assert windows.count == len(found)
    for window in found:
        assert (np.diff(window.rows.index) > 0).all()
        assert window.rows.table["t"].to_pylist() == [texts[i] for i in window.rows.index]
        assert window.rows.table.column_names == ["t"]
    numbers = [row for window in found for row in window.rows.index.tolist()]
    assert sorted(numbers) == np.flatnonzero(wanted).tolist()
    each = prompts(builder, found)
    apart = sum(map(distinct_tokens, each))
    together = distinct_tokens([tokens for some in each for tokens in some])
    # A merged token may sort elsewhere than its text, which only ever makes windows share more.
    assert together <= apart <= together + windows.repeated_tokens
    assert windows.repeated_tokens == sum(window.repeated_tokens for window in found)


def test_shuffled_groups_find_together(tmp_path, monkeypatch):
    monkeypatch.setattr("batchllm.windows._SAMPLE_ROWS", 600)
    rng = np.random.default_rng(0)
    texts = [f"{f'group {i % 60:03d} ' * 10} row {i}" for i in range(1200)]
    rng.shuffle(texts)
    source = InMemory(pa.table({"t": texts}), batch_rows=100)
    builder = PromptBuilder(PromptSpec(prompt_column="t"), tiny_tokenizer(), 5000)
    wanted = np.ones(1200, dtype=np.bool_)
    windows = Windows(source, builder, wanted, window_rows=150, scratch=tmp_path / "s")
    each = prompts(builder, windows)
    assert len(each) >= 8
    assert all(len(some) < 300 for some in each)
    apart = sum(map(distinct_tokens, each))
    together = distinct_tokens([tokens for some in each for tokens in some])
    in_order = [
        distinct_tokens(list(builder.build(source.table.slice(at, 150)).tokens))
        for at in range(0, 1200, 150)
    ]
    assert apart < 1.02 * together
    assert sum(in_order) > 1.5 * together
    assert windows.repeated_tokens == apart - together


@pytest.mark.parametrize(
    "spec",
    [
        {"token_ids_column": "ids"},
        {"messages_column": "messages"},
        {"template": "{{ a }}: {{ b }}"},
        {"template": "always the same"},
    ],
)
def test_every_source_of_prompts_can_be_dealt_out(tmp_path, spec):
    rows = [
        {
            "ids": [5 + i % 3, 6, 7 + i],
            "messages": json.dumps([{"role": "user", "content": f"{i % 3} {i}"}]),
            "a": i % 3,
            "b": None if i == 7 else i,
        }
        for i in range(30)
    ]
    source = InMemory(pa.Table.from_pylist(rows))
    builder = PromptBuilder(PromptSpec(**spec), tiny_tokenizer(), 500)
    windows = Windows(
        source, builder, np.ones(30, dtype=np.bool_), window_rows=10, scratch=tmp_path / "s"
    )
    found = list(windows)
    assert len(found) == 3
    assert sorted(i for window in found for i in window.rows.index.tolist()) == list(range(30))
    assert max(len(window.rows.index) for window in found) <= 15
    assert windows.head(4).num_rows == 4
    assert windows.head(100).num_rows == 30
    assert windows.head(4).column_names == found[0].rows.table.column_names


def test_long_prompts_are_sampled_less_and_make_more_windows(tmp_path, monkeypatch):
    texts = [f"{i * 7919 % 1000:03d}" + "x" * (20 + 200 * (i % 2)) for i in range(1000)]
    builder = PromptBuilder(PromptSpec(prompt_column="t", chat=False), tiny_tokenizer(), 500)
    monkeypatch.setattr("batchllm.windows._SAMPLE_ROWS", 800)
    monkeypatch.setattr("batchllm.windows._SAMPLE_BYTES", 20_000)
    monkeypatch.setattr("batchllm.windows._WINDOW_BYTES", 6_000)
    windows = Windows(
        InMemory(pa.table({"t": texts}), batch_rows=50),
        builder,
        np.ones(1000, dtype=np.bool_),
        window_rows=500,
        scratch=tmp_path / "s",
    )
    sizes = [sum(map(len, window.rows.table["t"].to_pylist())) for window in windows]
    assert sum(sizes) == sum(map(len, texts))
    assert 15 <= len(sizes) <= 30
    assert max(sizes) < 20_000  # of 122,500; seven prompts of a window were looked at


def test_no_rows_have_no_windows(tmp_path):
    source = InMemory(pa.table({"t": pa.array([], pa.string())}))
    builder = PromptBuilder(PromptSpec(prompt_column="t"), tiny_tokenizer(), 500)
    windows = Windows(
        source, builder, np.zeros(0, dtype=np.bool_), window_rows=5, scratch=tmp_path / "s"
    )
    assert (windows.count, list(windows)) == (0, [])
