"""Tables answered on a cluster of Dask's: two processes of this machine."""

import os
import signal
import time

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from reviews import RESULTS, alone, call_of, reviews

from batchllm.errors import UsageError
from batchllm.integrations.summary import Summary

bags = pytest.importorskip("dask.bag")
frames = pytest.importorskip("dask.dataframe")
distributed = pytest.importorskip("distributed")

from batchllm.dask import generate, generate_bag, load  # noqa: E402

pytestmark = pytest.mark.dask
OPTIONS = {"model": "fake", "template": "{{ product }}\n{{ text.strip() }}?", "max_tokens": 6}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with (
        dask.config.set(temporary_directory=str(tmp_path_factory.mktemp("dask"))),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def local():
    with dask.config.set(scheduler="sync"):
        yield


@pytest.fixture(scope="module")
def table():
    return reviews(3000, seed=0)


@pytest.fixture(scope="module")
def expected(table):
    return alone(call_of(), table)


def same_answers(got, expected):
    for name in RESULTS:
        assert got[name].replace({np.nan: None}).tolist() == expected[name].to_pylist(), name


def loads():
    from batchllm.integrations.held import HOLDER

    return HOLDER._num_loads


def test_answers_are_those_of_one_process(client, table, expected):
    frame, summary = frames.from_pandas(table.to_pandas(), npartitions=5), Summary()
    out = generate(frame, summary=summary, **OPTIONS)
    assert set(client.run(loads).values()) == {0}  # nothing is loaded to build the graph
    assert out.divisions == frame.divisions and out.npartitions == 5
    got = out.compute()
    assert got.dtypes.equals(out.dtypes)
    same_answers(got, expected[0])
    assert got["id"].tolist() == list(range(3000))
    assert set(client.run(loads).values()) == {1}
    assert summary.model_loads == summary.workers == 2
    assert summary.metrics.rows == 3000 and summary.metrics.failed == 31
    assert summary.computed_alone == expected[1].computed_prompt_tokens
    assert summary.metrics.computed_prompt_tokens <= 1.05 * expected[1].computed_prompt_tokens


def test_a_worker_killed_in_the_middle_loses_nothing(client, table, expected):
    long = {**OPTIONS, "max_tokens": 48}
    table = pa.concat_tables([table] * 2)
    expected, _ = alone(call_of(max_tokens=48), table)
    frame, summary = frames.from_pandas(table.to_pandas(), npartitions=4), Summary()
    out = generate(frame, summary=summary, num_partitions=12, **long).persist()
    while not summary.partitions:
        time.sleep(0.01)
    (first, *_), done = summary.partitions.values(), len(summary.partitions)
    os.kill(first.loaded.process, signal.SIGKILL)
    assert done < 12
    got = out.compute()
    same_answers(got, expected)
    assert summary.metrics.rows == 6000 and len(summary.partitions) == 12
    assert len({report.loaded.process for report in summary.partitions.values()}) >= 2
    client.wait_for_workers(2)
    assert first.loaded.process not in client.run(os.getpid).values()


def test_resources_decide_who_answers(client, table, expected):
    client.wait_for_workers(2)
    chosen, pid = next(iter(client.run(os.getpid).items()))

    async def give(amount, dask_worker):
        await dask_worker.set_resources(GPU=amount)

    with pytest.raises(UsageError, match=r"no worker has resources=\{'GPU': 1\}"):
        generate(frames.from_pandas(pd.DataFrame({"a": ["b"]})), resources={"GPU": 1}, **OPTIONS)
    client.run(give, 1, workers=[chosen])
    summary = Summary()
    frame = frames.from_pandas(table.to_pandas(), npartitions=3).persist()
    got = generate(frame, summary=summary, num_partitions=6, resources={"GPU": 1}, **OPTIONS)
    same_answers(got.compute(), expected[0])
    assert {report.loaded.process for report in summary.partitions.values()} == {pid}
    for npartitions in (1, 3):
        items = bags.from_sequence(["a b", "a c"] * 50, npartitions=npartitions)
        out = generate_bag(items, summary=summary, resources={"GPU": 1}, model="fake")
        assert len(out.compute()) == 100
        assert {report.loaded.process for report in summary.partitions.values()} == {pid}
    client.run(give, 0, workers=[chosen])


def test_models_are_loaded_ahead(client):
    load(model="fake", max_num_seqs=5)
    before = client.run(loads)
    out = generate_bag(bags.from_sequence(["a"]), model="fake", max_num_seqs=5)
    out.compute()
    assert client.run(loads) == before
