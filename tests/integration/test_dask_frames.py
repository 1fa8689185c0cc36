"""What Dask's collections are before and after, answered without a cluster."""

import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from reviews import alone, call_of, reviews
from test_dask import OPTIONS, same_answers

from batchllm.errors import InputError, UsageError
from batchllm.integrations.summary import Summary

dask = pytest.importorskip("dask")
bags = pytest.importorskip("dask.bag")
frames = pytest.importorskip("dask.dataframe")

from batchllm.dask import generate, generate_bag, load  # noqa: E402
from batchllm.integrations.dask_cluster import Assign  # noqa: E402

pytestmark = pytest.mark.dask


@pytest.fixture(autouse=True)
def scheduler():
    with dask.config.set(scheduler="sync"):
        yield


@pytest.fixture(scope="module")
def table():
    return reviews(600, seed=0)


@pytest.fixture(scope="module")
def expected(table):
    return alone(call_of(), table)


def strange(table):
    """A frame of many types; its index says nothing about the order of rows."""
    frame = table.to_pandas()
    n = len(frame)
    frame["text"] = frame["text"].astype("string[pyarrow]")
    frame["product"] = frame["product"].astype("category")
    frame["lists"] = [[i, str(i)] for i in range(n)]
    frame["maybe"] = pd.array([None if i % 3 else i for i in range(n)], "Int64")
    frame["when"] = pd.date_range("2020-01-01", periods=n, tz="Europe/Zurich")
    frame["arrow"] = pd.array(range(n), pd.ArrowDtype(pa.int16()))
    frame.index = pd.Index([i % 7 for i in range(n)], name="key")
    return frame


def test_columns_and_index_stay_what_they_were(table, expected):
    frame = strange(table)
    with dask.config.set({"dataframe.convert-string": False}):
        source = frames.from_pandas(frame, npartitions=3, sort=False)
        summary = Summary()
        out = generate(source, workers=2, num_partitions=4, summary=summary, **OPTIONS)
        got = out.compute()
    pd.testing.assert_frame_equal(got[frame.columns], frame)
    same_answers(got, expected[0])
    assert got.dtypes.equals(out.dtypes) and list(got.columns) == list(out.columns)
    assert not out.known_divisions and out.npartitions == 3
    assert len(summary.partitions) == 4 and summary.metrics.rows == 600


def test_files_are_read_by_columns_and_keep_their_partitions(table, expected, tmp_path):
    wide = table.to_pandas().assign(**{f"more{i}": "x" * 100 for i in range(20)})
    for i in range(4):
        wide[i * 150 : i * 150 + 150].to_parquet(tmp_path / f"{i}.parquet")
    whole = frames.read_parquet(tmp_path)
    few = whole[["id", "product", "text"]].map_partitions(pd.DataFrame.copy)
    assert few.optimize().npartitions < 4  # Dask joins files of which it reads little
    for source in (whole, few):
        out = generate(source, **OPTIONS)
        assert out.npartitions == 4
        got = out.compute()
        assert got["id"].tolist() == list(range(600))
        same_answers(got, expected[0])


def test_one_partition_of_many_can_be_had(table, expected):
    out = generate(frames.from_pandas(table.to_pandas(), npartitions=3), **OPTIONS)
    assert (
        out.partitions[1].compute()["answer"].tolist() == out.compute()["answer"].tolist()[200:400]
    )
    assert len(out[out["id"] > 500]) == 99


def test_partitions_without_rows_or_values():
    frame = pd.DataFrame({"ids": [[5, 6, 7], None, [5, 6]], "n": [3, 2, 1]})
    with dask.config.set({"dataframe.convert-string": False}):
        source = frames.from_pandas(frame, npartitions=3, sort=False)
        options = {"model": "fake", "token_ids_column": "ids", "max_tokens_column": "n"}
        got = generate(source[source["n"] != 3], **options).compute()
        assert got["answer"].isna().tolist() == [True, False]
        none = generate(source[source["n"] > 3], **options).compute()
    assert len(none) == 0 and list(none.columns) == list(got.columns)


def test_bags_of_dicts_and_of_texts(table, expected):
    rows = table.to_pylist()
    summary = Summary()
    source = bags.from_sequence(rows, npartitions=4).map(dict)
    got = generate_bag(source, workers=2, summary=summary, **OPTIONS).compute()
    assert [{name: row[name] for name in table.column_names} for row in got] == rows
    assert [row["answer"] for row in got] == expected[0]["answer"].to_pylist()
    assert summary.metrics.rows == 600
    lazy = bags.from_sequence(["one", "two", "one"], npartitions=2).map_partitions(iter)
    got = generate_bag(lazy, model="fake", max_tokens=3).compute()
    assert [row["prompt"] for row in got] == ["one", "two", "one"]
    assert got[0]["answer"] == got[2]["answer"] != got[1]["answer"]
    with pytest.raises(InputError, match="one is a int"):
        generate_bag(bags.from_sequence([1]), model="fake")


@pytest.mark.parametrize("npartitions", [1, 3])
def test_answers_are_tasks_that_a_scheduler_finds(npartitions):
    items = bags.from_sequence(["a", "b", "c"], npartitions=npartitions)
    for out in (generate_bag(items, model="fake"), generate_bag(items, model="fake").map(len)):
        tasks = out.__dask_optimize__(out.dask, out.__dask_keys__())
        names = [key[0] for key in tasks if isinstance(key, tuple)]
        assert [name for name in names if "answer-" in name] == [
            name for name in names if re.fullmatch("batchllm-answer-[0-9a-f]{32}", name)
        ]


def test_the_largest_partitions_begin_first_each_on_a_worker_of_its_own():
    keys = [("batchllm-answer-x", i) for i in range(4)]
    others = [("batchllm-answer-y", 0), ("batchllm-back-x", 0, 1), "batchllm-plan-x"]

    def tasks_of(resources):
        tasks = {key: SimpleNamespace(priority=(0, 1, 5 - i)) for i, key in enumerate(keys)}
        tasks |= {key: SimpleNamespace(priority=(0, 1, 9)) for key in others}
        plugin = Assign("batchllm-answer-x", 4, ("one", "two"), resources)
        plugin.update_graph(SimpleNamespace(tasks=tasks), tasks=list(tasks))
        order = sorted(tasks, key=lambda key: tasks[key].priority)
        assert order[:4] == keys
        assert all(vars(tasks[key]) == {"priority": (0, 1, 9)} for key in others)
        return [tasks[key] for key in keys]

    pinned = [vars(task).get("worker_restrictions") for task in tasks_of({})]
    assert pinned == [{"one"}, {"two"}, None, None]
    assert all(task.loose_restrictions for task in tasks_of({})[:2])
    assert all(task.resource_restrictions == {"GPU": 1} for task in tasks_of({"GPU": 1}))


def test_dicts_may_lack_keys_and_have_strange_values():
    rows = [{"prompt": "a"}, {"prompt": None, "other": object()}, {"other": 3}, {"prompt": "b"}]
    got = generate_bag(bags.from_sequence(rows, npartitions=4), model="fake").compute()
    assert [row["answer"] is None for row in got] == [False, True, True, False]
    assert got[1]["other"] is rows[1]["other"] and "prompt" not in got[2]


def drawn_anew(sizes):
    """Two partitions whose rows come in another order each time, and so many."""
    state = np.random.default_rng(0)

    def draw(_):
        rows = state.permutation(int(state.choice(sizes)))
        return pd.DataFrame({"q": [f"{row}?" for row in rows], "ids": [[row] for row in rows]})

    with dask.config.set({"dataframe.convert-string": False}):
        return frames.from_map(draw, [0, 1], meta=pd.DataFrame({"q": ["?"], "ids": [[1]]}))


@pytest.mark.parametrize("sizes", [[100], range(100, 1000)])
@pytest.mark.parametrize("source", ["prompt_column", "token_ids_column"])
def test_a_frame_that_is_drawn_anew_is_refused(sizes, source):
    frame = drawn_anew(sizes)
    options = {"model": "fake", source: {"prompt_column": "q", "token_ids_column": "ids"}[source]}
    with pytest.raises(InputError, match="persist"):
        generate(frame, **options).compute()
    kept = frame.persist()
    assert generate(kept, **options).compute()["q"].tolist() == kept.compute()["q"].tolist()


def test_what_makes_no_sense_is_said_at_once(table):
    source = frames.from_pandas(table.to_pandas(), npartitions=2)
    for options, message in [
        ({"template": "{{ nothere }}"}, "nothere"),
        ({"template": "always the same"}, "prints no column"),
        ({"output_column": "text"}, "has a column 'text'"),
        ({"num_partitions": 0}, "num_partitions is 0"),
        ({"resources": {"GPU": 1}}, "make a distributed.Client"),
        ({"max_tokns": 3}, "did you mean 'max_tokens'"),
    ]:
        with pytest.raises(UsageError, match=message):
            generate(source, **{**OPTIONS, **options})
    with pytest.raises(UsageError, match="this is a Series"):
        generate(source["text"], **OPTIONS)
    with pytest.raises(UsageError, match="rename 3"):
        generate(source.rename(columns={"id": 3}), **OPTIONS)
    with pytest.raises(UsageError, match="no workers"):
        load(model="fake")
    with dask.config.set(scheduler="processes"), pytest.raises(UsageError, match="a summary"):
        generate_bag(bags.from_sequence(["a"]), model="fake", summary=Summary())
