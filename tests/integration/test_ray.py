"""`generate` for Ray Data, on a cluster of two processes."""

import os
import signal
import threading
import time

import psutil
import pyarrow as pa
import pytest
from guides import run_guide
from reviews import OPTIONS, RESULTS, reviews

from batchllm import LLM, SamplingParams
from batchllm.errors import ModelError, UsageError
from batchllm.integrations.summary import Summary

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.ray,
    # Ray's own configuration warns of its own fields.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]
ROWS, BLOCKS = 3000, 6


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        num_cpus=2,
        object_store_memory=200 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.wait_for_min_actors_s = 300  # so that the first does not answer what is the second's
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def table():
    return reviews(ROWS)


@pytest.fixture(scope="module")
def alone(table):
    llm = LLM("fake")
    params = SamplingParams(max_tokens=OPTIONS["max_tokens"])
    return llm.generate(table, params, template=OPTIONS["template"]), llm.metrics


@pytest.fixture
def dataset(cluster, table):
    size = ROWS // BLOCKS
    return ray.data.from_arrow([table.slice(begin, size) for begin in range(0, ROWS, size)])


def whole(dataset):
    return pa.concat_tables(ray.get(dataset.to_arrow_refs())).combine_chunks()


def test_two_workers_answer_as_one_engine_does(dataset, table, alone):
    from batchllm.ray import generate

    def first_is_last(block):
        if block["id"][0].as_py() == 0:
            time.sleep(2)
        return block

    late = dataset.map_batches(first_is_last, batch_size=None, batch_format="pyarrow")
    summary = Summary()
    got = generate(late, workers=2, summary=summary, **OPTIONS)
    answers, metrics = alone
    assert got.num_blocks() == BLOCKS
    assert whole(got).select(table.column_names).equals(table.combine_chunks())
    assert whole(got).select(RESULTS).equals(answers.select(RESULTS).combine_chunks())
    assert summary.metrics.rows == ROWS and summary.metrics.failed == metrics.failed > 0
    assert summary.model_loads == summary.workers == len(summary.partitions) == 2
    computed = summary.metrics.computed_prompt_tokens
    assert summary.computed_alone == metrics.computed_prompt_tokens
    assert computed <= 1.05 * metrics.computed_prompt_tokens
    assert in_table_order(dataset) > 1.5 * computed


def in_table_order(dataset):
    """Prompt tokens that are computed where each block is answered by itself."""
    llm = LLM("fake")
    params = SamplingParams(max_tokens=OPTIONS["max_tokens"])
    for block in ray.get(dataset.to_arrow_refs()):
        llm.generate(block, params, template=OPTIONS["template"])
    return llm.metrics.computed_prompt_tokens


def test_a_worker_that_is_killed_loses_nothing(dataset, table, alone):
    from batchllm.ray import generate

    killed = []

    def kill():
        while not killed:
            for process in psutil.Process().children(recursive=True):
                if "MapWorker" in title(process) and ".submit" in title(process):
                    time.sleep(0.2)
                    killed.append(process.pid)
                    os.kill(process.pid, signal.SIGKILL)
                    return
            time.sleep(0.02)

    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    summary = Summary()
    slow = {"max_num_seqs": 2, "num_partitions": 3}
    got = generate(dataset, workers=2, summary=summary, **OPTIONS, **slow)
    watcher.join()
    assert killed[0] not in {one.loaded.process for one in summary.partitions.values()}
    assert sorted(summary.partitions) == [0, 1, 2] and summary.metrics.rows == ROWS
    assert whole(got).select(table.column_names).equals(table.combine_chunks())
    assert whole(got).select(RESULTS).equals(alone[0].select(RESULTS).combine_chunks())
    assert summary.computed_alone == alone[1].computed_prompt_tokens


def title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_mistakes_are_ours_and_no_rows_are_no_mistake(dataset, table):
    from batchllm.ray import generate

    with pytest.raises(UsageError, match="did you mean 'text'"):
        generate(dataset, model="fake", prompt_column="texts")
    with pytest.raises(ModelError, match="no such file"):
        generate(dataset, model="/not/there", prompt_column="text")
    with pytest.raises(UsageError, match="workers is 0"):
        generate(dataset, workers=0, **OPTIONS)
    none = generate(ray.data.from_arrow(table.slice(0, 0)), **OPTIONS)
    assert none.schema().names[-len(RESULTS) - 1 :][0] == "answer" and none.count() == 0


def test_an_actor_has_its_share_of_its_node(cluster):
    from batchllm.integrations.call import GenerateCall
    from batchllm.ray import Pool

    call = GenerateCall.of_options(**OPTIONS)
    assert Pool.choose(None, None, None).workers == 1  # one node
    assert Pool(4, None, None).adapt(call).config.machine_share == 4
    config = Pool(2, 8, None).adapt(call).config
    assert config.threads // config.num_processes == 8
    assert Pool(2, 8, None).adapt(GenerateCall.of_options(**OPTIONS, threads=6)).config.threads == 6


def test_the_guide_runs(cluster, tmp_path, monkeypatch):
    names = run_guide("RAY.md", tmp_path, monkeypatch)
    assert names["answered"].count() == 2000
