"""`frame.batchllm.generate`: Polars' own types, laziness and optimizer around one engine."""

import datetime as dt

import polars as pl
import pytest
from guides import run_guide
from polars.testing import assert_frame_equal
from reviews import OPTIONS, RESULTS, reviews

import batchllm.polars  # noqa: F401  # adds the namespace
from batchllm import LLM, SamplingParams
from batchllm.errors import BatchLLMError, UsageError
from batchllm.integrations.summary import Summary


@pytest.fixture(scope="module")
def frame():
    return pl.DataFrame(pl.from_arrow(reviews(1500)))


@pytest.fixture(scope="module")
def answered(frame):
    return frame.batchllm.generate(**OPTIONS)


def test_answers_are_those_of_one_engine(frame, answered):
    llm = LLM("fake")
    table = llm.generate(
        frame.to_arrow(), SamplingParams(max_tokens=6), template=OPTIONS["template"]
    )
    alone = pl.DataFrame(pl.from_arrow(table))
    # Who computed what all share depends on what a held model has learned of answers' lengths.
    others = pl.exclude("cached_tokens")
    assert_frame_equal(answered.select(others), alone.select(others))
    assert answered.columns == alone.columns
    assert answered["error"].null_count() == 1500 - 16


def test_windows_are_cut_where_little_is_shared_and_the_model_is_held(frame, answered):
    summary, alone, held = Summary(), Summary(), Summary()
    windows = frame.batchllm.generate(**OPTIONS, window_rows=200, summary=summary)
    assert_frame_equal(windows.select(RESULTS), answered.select(RESULTS))
    frame.batchllm.generate(**OPTIONS, summary=alone)
    few = frame.head(9).batchllm.generate(**OPTIONS, summary=held)
    assert_frame_equal(few.select(RESULTS), answered.select(RESULTS).head(9))
    assert summary.metrics.windows >= 8 and summary.metrics.rows == 1500
    computed = alone.metrics.computed_prompt_tokens
    assert summary.computed_alone == computed
    assert summary.metrics.computed_prompt_tokens <= 1.1 * computed
    in_table_order = Summary()
    total = 0
    for piece in frame.iter_slices(200):
        piece.batchllm.generate(**OPTIONS, summary=in_table_order)
        total += in_table_order.metrics.computed_prompt_tokens
    assert total > 1.5 * computed
    loads = [one.partitions[0].loaded for one in (summary, alone, held)]
    assert loads[0] == loads[1] == loads[2]


def test_types_survive(frame):
    kinds = pl.Enum(["new", "used"])
    wide = frame.head(50).with_columns(
        pl.col("product").cast(pl.Categorical).alias("category"),
        pl.lit("used").cast(kinds).alias("kind"),
        pl.lit(dt.date(2026, 2, 28)).alias("day"),
        pl.lit(dt.timedelta(seconds=3)).alias("took"),
        pl.lit("1.50").cast(pl.Decimal(10, 2)).alias("price"),
        pl.lit(None).alias("nothing"),
        pl.lit(b"\xff").alias("raw"),
        pl.col("id").cast(pl.UInt8).alias("error"),
        pl.concat_list("id", "id").cast(pl.Array(pl.Int64, 2)).alias("pair"),
        pl.struct("id", "text").alias("both"),
    )
    template = "{{ category }} {{ kind }} {{ day }} {{ both.text }}"
    for window_rows in (20, 100):
        options = {"template": template, "max_tokens": 2, "window_rows": window_rows}
        got = wide.batchllm.generate(model="fake", **options)
        lazy = wide.lazy().batchllm.generate(model="fake", **options)
        assert_frame_equal(got.select(wide.columns), wide)
        assert got.columns[wide.width : wide.width + 2] == ["answer", "answer_finish_reason"]
        assert got["answer_error"].null_count() == 49  # the text of one is null
        assert lazy.collect_schema() == got.schema == lazy.collect().schema


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_what_comes_after_a_lazy_answer_does_not_move_in_front_of_it(frame, answered, engine):
    summary = Summary()
    lazy = frame.lazy().batchllm.generate(**OPTIONS, temperature=1.0, summary=summary)
    wanted = frame.batchllm.generate(**OPTIONS, temperature=1.0)

    def ask(of):
        few = of.filter(pl.col("id") % 3 == 1, pl.col("answer").str.len_chars() > 3)
        return few.select("answer", twice=pl.col("id") * 2).slice(100, 20)

    assert not summary.partitions
    assert_frame_equal(ask(lazy).collect(engine=engine), ask(wanted))
    assert summary.metrics.rows == 1500  # all of them, planned together
    before = ask(frame.lazy().filter(pl.col("id") < 500).batchllm.generate(**OPTIONS))
    assert_frame_equal(before.collect(engine=engine), ask(answered.filter(pl.col("id") < 500)))


def test_a_large_lazy_file_is_one_table(frame, tmp_path):
    frame.write_parquet(tmp_path / "in.parquet", row_group_size=100)
    summary = Summary()
    options = OPTIONS | {"summary": summary, "window_rows": 10_000}
    lazy = pl.scan_parquet(tmp_path / "in.parquet").batchllm.generate(**options)
    lazy.select("id", "answer").sink_parquet(tmp_path / "out.parquet")
    assert summary.metrics.rows == 1500 and summary.metrics.windows == 1
    assert pl.read_parquet(tmp_path / "out.parquet")["id"].equals(frame["id"])


def test_mistakes_are_told_before_anything_runs(frame):
    lazy = frame.lazy()
    with pytest.raises(UsageError, match="did you mean 'text'"):
        lazy.batchllm.generate(model="fake", prompt_column="texts")
    with pytest.raises(UsageError, match="unknown option 'max_token'"):
        frame.batchllm.generate(model="fake", prompt_column="text", max_token=3)
    with pytest.raises(UsageError, match="has a column 'answer'"):
        lazy.batchllm.generate(**OPTIONS).batchllm.generate(**OPTIONS)
    later = lazy.batchllm.generate(model="/not/there", prompt_column="text")
    with pytest.raises(BatchLLMError, match="no such file"):
        later.collect()


def test_no_rows_and_no_columns_in_the_template(frame, answered):
    assert frame.head(0).batchllm.generate(**OPTIONS).schema == answered.schema
    same = frame.head(7).batchllm.generate(model="fake", template="Hello", window_rows=2)
    assert same["answer"].n_unique() == 1 and same.height == 7


def test_fields_are_reordered_alike_in_one_window_and_in_many(frame):
    options = {"model": "fake", "template": "{{ row | tojson }}", "reorder_fields": True}
    summary = Summary()
    for window_rows in (300, 10_000):
        frame.batchllm.generate(**options, max_tokens=2, window_rows=window_rows, summary=summary)
        assert summary.metrics.failed == 0 and summary.metrics.saved_share > 0.5


def test_the_guide_runs(tmp_path, monkeypatch):
    names = run_guide("POLARS.md", tmp_path, monkeypatch)
    assert names["answered"]["error"].null_count() == 2000
