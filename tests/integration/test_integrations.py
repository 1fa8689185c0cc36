"""What every engine's integration is made of, run without an engine."""

import numpy as np
import pyarrow as pa
import pytest
from cluster import run, split
from reviews import RESULTS, alone, call_of, reviews

from batchllm.errors import InputError, UsageError
from batchllm.integrations.call import GenerateCall
from batchllm.integrations.held import ModelHolder
from batchllm.integrations.passes import count_rows, place_rows, sample_rows
from batchllm.integrations.survey import survey
from batchllm.models.checkpoint import ModelSource


@pytest.fixture(scope="module")
def table():
    return reviews(3000)


@pytest.fixture
def holder():
    return ModelHolder()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_one_engine(table, holder, temperature):
    call = call_of(temperature=temperature, seed=3)
    expected, metrics = alone(call, table)
    got, summary = run(call, split(table, 5), 3, holder)
    assert got.select(["id", "text", *RESULTS]).equals(expected.select(["id", "text", *RESULTS]))
    assert got["error"].null_count == 3000 - 31
    assert summary.metrics.rows == 3000 and summary.metrics.failed == 31
    assert summary.model_loads == summary.workers == 1
    assert len(summary.partitions) == 3
    assert summary.computed_alone == metrics.computed_prompt_tokens
    assert summary.metrics.computed_prompt_tokens <= 1.05 * metrics.computed_prompt_tokens


def test_windows_of_a_partition_are_counted_too(table, holder):
    call = call_of(window_rows=200)
    expected, metrics = alone(call, table)
    got, summary = run(call, split(table, 2), 2, holder)
    assert got.select(RESULTS).equals(expected.select(RESULTS))
    assert summary.metrics.windows >= 15 and summary.metrics.window_repeated_tokens > 0
    assert summary.computed_alone == metrics.computed_prompt_tokens


def test_partitions_repeat_about_what_was_expected_and_cost_alike(table, holder):
    _, summary = run(call_of(), split(table, 3), 4, holder, num_partitions=8)
    assert len(summary.partitions) == 8
    seconds = summary.expected.seconds
    assert max(seconds) <= 1.3 * np.mean(seconds)
    repeated = summary.partition_repeated_tokens
    assert 0 < repeated < 2 * summary.expected.repeated_tokens + 100
    computed = [r.metrics.computed_prompt_tokens for r in summary.partitions.values()]
    assert sum(computed) - repeated == pytest.approx(summary.expected.computed_tokens, rel=0.3)
    text = str(summary)
    assert "3,000 rows, 31 failed, in 8 partitions on 1 workers (1 model loads)" in text
    assert "expected: 8 partitions of" in text
    assert summary.as_dict()["partition_repeated_tokens"] == repeated


def test_a_partition_that_ran_twice_counts_once(table, holder):
    _, summary = run(call_of(), split(table, 3), 2, holder)
    before = summary.as_dict()
    summary.add(list(summary.partitions.values()))
    assert summary.as_dict() == before


def test_rows_come_in_any_number_of_partitions_also_empty_ones(table, holder):
    few = table.slice(0, 7)
    empty = [pa.RecordBatch.from_pylist([], schema=table.schema)]
    inputs = [empty, *split(few, 2), empty]
    got, summary = run(call_of(), inputs, 5, holder)
    assert got["id"].to_pylist() == list(range(7)) and summary.metrics.rows == 7
    got, summary = run(call_of(), [empty, empty], 3, holder)
    assert got.num_rows == 0 and summary.metrics.rows == 0


def test_max_tokens_of_rows_and_token_ids(holder):
    rng = np.random.default_rng(1)
    heads = [rng.integers(0, 200, 30).tolist() for _ in range(5)]
    rows = [heads[i % 5] + rng.integers(0, 200, 4).tolist() for i in range(400)]
    limits = [None if i % 3 == 0 else i % 7 + 1 for i in range(400)]
    table = pa.table({"ids": pa.array(rows, pa.list_(pa.int32())), "limit": limits})
    call = GenerateCall.of_options(
        model="fake",
        token_ids_column="ids",
        max_tokens_column="limit",
        max_tokens=9,
        ignore_eos=True,
    )
    expected, metrics = alone(call, table)
    got, summary = run(call, split(table, 3), 2, holder)
    assert got.select(RESULTS).equals(expected.select(RESULTS))
    assert summary.computed_alone == metrics.computed_prompt_tokens


def test_fields_are_reordered_by_one_set_of_rules(table, holder):
    call = call_of(template="{{ row | tojson }}", reorder_fields=True)
    got, summary = run(call, split(table, 3), 2, holder)
    _, metrics = alone(call, table)
    assert got["prompt_tokens"].null_count == 0 and summary.metrics.failed == 0
    share = summary.metrics.computed_prompt_tokens / metrics.computed_prompt_tokens
    assert share < 1.1  # other rules than from the whole table, about as good


def test_samples_are_even_and_the_same_again(table):
    batches = split(table, 1)[0]
    one, two = (sample_rows(batches, ["id"], 500, 7) for _ in range(2))
    assert one.rows.equals(two.rows) and one.num_rows == 3000 and one.rows.num_rows == 500
    drawn = np.concatenate([sample_rows(batches, ["id"], 500, s).rows["id"] for s in range(40)])
    by_third = np.bincount(drawn // 1000)
    assert by_third.sum() == 20_000 and abs(by_third / 20_000 - 1 / 3).max() < 0.02
    assert len(np.unique(one.rows["id"])) == 500
    assert sample_rows(batches[:2], ["id"], 500, 7).rows.num_rows == 200


def test_a_table_that_changes_between_passes_is_refused(table):
    inputs = split(table, 2)
    names = ["product", "text"]
    ranges = survey(call_of(), [sample_rows(b, names, 99, 0) for b in inputs], 2).ranges
    for change in (inputs[0][:-1], [*inputs[0], inputs[0][0]]):
        with pytest.raises(InputError, match="input partition 0 had 1,500 rows at first"):
            list(place_rows(change, ranges, 0))
        with pytest.raises(InputError, match="persist"):
            count_rows(change, ranges, 0)


def test_rows_find_the_same_places_in_whatever_order_a_partition_gives_them(table):
    same = pa.table({"product": ["same"] * 400, "text": ["same"] * 400, "id": np.arange(400)})
    inputs = split(pa.concat_tables([same.select(table.column_names), table.slice(0, 99)]), 4)
    samples = [sample_rows(b, ["product", "text"], 99, 0) for b in inputs]
    ranges = survey(call_of(), samples, 4, num_partitions=4).ranges
    for number, batches in enumerate(inputs):
        there, back = (
            pa.Table.from_batches(list(place_rows(order, ranges, number))).sort_by("id")
            for order in (batches, [b.take(np.arange(b.num_rows)[::-1]) for b in batches[::-1]])
        )
        assert there["__batchllm_place"].equals(back["__batchllm_place"])
        assert not there["__batchllm_row"].equals(back["__batchllm_row"])


def test_another_model_takes_the_first_ones_place(holder):
    one, two = call_of(), call_of(max_num_seqs=7)
    with holder.use(one) as (first, loaded):
        pass
    with holder.use(call_of(max_tokens=99)) as (again, same):  # what is asked does not matter
        assert again is first and same == loaded
    with holder.use(two) as (other, loaded):
        assert other is not first and loaded.number == 2
    holder.drop()
    with holder.use(two) as (_, loaded):
        assert loaded.number == 3


def test_options_go_where_they_belong():
    call = GenerateCall.of_options(prompt_column="q", max_tokens=3, threads=1, temperature=0.5)
    assert call.spec.prompt_column == "q" and call.config.threads == 1
    assert call.params.max_tokens == 3 and call.params.temperature == 0.5
    assert call.model == ModelSource(None)
    with pytest.raises(
        UsageError, match="unknown option 'prompt_col'; did you mean 'prompt_column'"
    ):
        GenerateCall.of_options(prompt_col="q")
    with pytest.raises(UsageError, match="window_rows is 0"):
        GenerateCall.of_options(prompt_column="q", window_rows=0)


def test_columns_are_checked_before_anything_is_loaded(table):
    assert call_of().check(table.schema).answer == "answer"
    with pytest.raises(UsageError, match="nothere"):
        call_of(template="{{ nothere }}").check(table.schema)
    with pytest.raises(UsageError, match="has a column 'text'"):
        call_of(output_column="text").check(table.schema)
    with pytest.raises(UsageError, match="__batchllm_row"):
        call_of().check(table.append_column("__batchllm_row", table["id"]).schema)
