"""The ladder's workloads, on tiny sizes."""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import tiny_tokenizer, write_gguf_model
from yardstick import load_ladder

w = load_ladder("bench_engines.workloads")
contract = load_ladder("bench_engines.contract")
micro = sys.modules["micro"]

TINY = w.Micro(micro.MicroShape(groups=2, members=3, prefix=5, own=2, output=4))


def test_a_workload_is_made_once_and_again_when_its_recipe_changes(tmp_path):
    first = w.Workload(name="tiny", recipe=TINY).make(tmp_path, tmp_path)
    rows = contract.Rows.read(first, "shuffled")
    assert len(rows) == 6
    assert rows.max_tokens == [4] * 6
    made = first.stat().st_mtime_ns
    assert w.Workload(name="tiny", recipe=TINY).make(tmp_path, tmp_path) == first
    assert first.stat().st_mtime_ns == made
    other = w.Micro(micro.MicroShape(groups=2, members=4, prefix=5, own=2, output=4))
    w.Workload(name="tiny", recipe=other).make(tmp_path, tmp_path)
    assert len(contract.Rows.read(first, "shuffled")) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["ladder-tiny.parquet"]


def test_sorted_rows_keep_their_answers_lengths(tmp_path):
    table = pa.table({"token_ids": [[3], [1, 2], [1]], "max_tokens": [7, 8, 9]})
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = contract.Rows.read(tmp_path / "rows.parquet", "sorted")
    assert rows == contract.Rows([[1], [1, 2], [3]], [9, 8, 7])


def test_a_sample_has_whole_groups_in_the_order_of_the_table():
    table = pa.table({"group": list("abcabcddab"), "row": range(10)})
    sample = w.sample_groups(table, "group", 2, seed=0)
    drawn = set(sample["group"].to_pylist())
    assert len(drawn) == 2
    assert sample.to_pylist() == [row for row in table.to_pylist() if row["group"] in drawn]
    assert sample == w.sample_groups(table, "group", 2, seed=0)
    samples = [w.sample_groups(table, "group", 2, seed) for seed in range(9)]
    several = {frozenset(sample["group"].to_pylist()) for sample in samples}
    assert len(several) > 1
    with pytest.raises(w.WorkloadError, match="4 groups, not 5"):
        w.sample_groups(table, "group", 5, seed=0)


def test_a_missing_table_says_what_to_do(tmp_path):
    recipe = w.Texts("tools", "{{ a }}", "a", 1)
    with pytest.raises(w.WorkloadError, match="text_workloads"):
        recipe.build(tmp_path, tmp_path)


def test_texts_are_tokenized_as_a_run_would(tmp_path, capsys):
    # The longest has no room for its answer in the tiny model's 256 tokens.
    table = pa.table(
        {
            "text": ["the ", "x" * 200, "hello ", "the "],
            "max_tokens": pa.array([3, 60, 4, 5], pa.int32()),
        }
    )
    pq.write_table(table, tmp_path / "words.parquet")
    model = write_gguf_model(tmp_path / "model.gguf")
    recipe = w.Texts("words", "{{ text }}\n\nWhat is it?", "text", groups=3)
    made = w.Workload(name="words", recipe=recipe).make(tmp_path, model)
    rows = contract.Rows.read(made, "shuffled")
    chat = "<|im_start|>user\n{}\n\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    expected = tiny_tokenizer().encode_batch(
        [chat.format(text) for text in ("the ", "hello ", "the ")], add_special_tokens=False
    )
    assert rows.prompts == [ids.tolist() for ids in expected]
    assert rows.max_tokens == [3, 4, 5]
    assert "1 rows left out" in capsys.readouterr().err


def test_lengths_are_cut(tmp_path):
    recipe = w.Lengths(
        trace="sharegpt", sharing=0.35, rows=32, longest_prompt=40, longest_output=10
    )
    table = recipe.build(tmp_path, tmp_path)
    lengths = np.array([len(row) for row in table["token_ids"].to_pylist()])
    prefix = lengths.min() - 1
    assert lengths.max() <= prefix + 40
    assert max(table["max_tokens"].to_pylist()) == 10


def test_the_ladder_has_what_was_asked():
    assert w.LADDER == [
        "8x32",
        "4x16",
        "256x1",
        "tools",
        "fewshot",
        "documents",
        "lengths",
        "overflow",
    ]
    apart = {name for name in w.LADDER if not w.WORKLOADS[name].in_shared_mean}
    assert apart == {"256x1", "overflow"}
    # More distinct prefix tokens than vLLM reports to have room for.
    shape = w.WORKLOADS["overflow"].recipe.shape
    assert shape.groups * shape.prefix > contract.KV_CACHE_BYTES // 23_040
