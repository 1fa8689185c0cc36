"""`batchllm.spark` on a real cluster of two executors, each a process of its own."""

import os
import shutil
import signal
import time
from threading import Thread

import psutil
import pyarrow as pa
import pytest
from guides import run_guide
from spark_cluster import NUM_ROWS, RESULTS, TEMPLATE, alone, questions, session_on

from batchllm import LLM, SamplingParams
from batchllm.errors import UsageError

pytest.importorskip("pyspark")
from pyspark.sql import functions as F

from batchllm.spark import Summary, generate, gpu_profile, register_function

pytestmark = [
    pytest.mark.spark,
    pytest.mark.skipif(shutil.which("java") is None, reason="no java"),
    pytest.mark.filterwarnings("ignore"),  # Spark's and pandas' own
]


@pytest.fixture(scope="module")
def spark(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("spark")
    gpus = scratch / "gpus.sh"  # what a worker asks which GPUs it has
    gpus.write_text("""#!/bin/sh\necho '{"name": "gpu", "addresses": ["5"]}'\n""")
    gpus.chmod(0o755)
    os.environ["SPARK_LOCAL_HOSTNAME"] = "localhost"
    config = {
        "spark.worker.resource.gpu.amount": "1",
        "spark.worker.resource.gpu.discoveryScript": str(gpus),
        "spark.executor.resource.gpu.amount": "1",
        "spark.task.resource.gpu.amount": "0.1",
    }
    with session_on("local-cluster[2,1,1024]", scratch, config) as session:
        yield session
    os.environ.pop("SPARK_LOCAL_HOSTNAME", None)


@pytest.fixture(scope="module")
def table():
    return questions()


@pytest.fixture(scope="module")
def files(spark, table, tmp_path_factory):
    """The table as five Parquet files, which Spark reads in order."""
    import pyarrow.parquet as pq

    path = tmp_path_factory.mktemp("table")
    for part in range(5):
        pq.write_table(table.slice(part * 1200, 1200), path / f"{part}.parquet")
    return spark.read.parquet(str(path))


def test_answers_are_those_of_one_engine_in_order_and_loads_are_as_many_as_workers(files, table):
    expected, metrics = alone(table, max_tokens=5)
    summary = Summary()
    df = generate(files, summary=summary, model="fake", template=TEMPLATE, max_tokens=5)
    added = ["answer", "finish_reason", "prompt_tokens", "cached_tokens", "output_tokens", "error"]
    assert df.columns == table.column_names + added
    assert summary.metrics.rows == 0 and len(summary.expected.seconds) == 2  # it is lazy
    got = df.toArrow()
    order = got["id"].to_pylist()
    inputs = files.select("id").toArrow()["id"].to_pylist()
    assert order == inputs and sorted(order) == list(range(NUM_ROWS))
    by_id = got.sort_by("id")
    assert by_id.select(RESULTS).to_pylist() == expected.select(RESULTS).to_pylist()
    assert by_id.select(table.column_names).to_pylist() == table.to_pylist()
    assert summary.metrics.rows == NUM_ROWS and summary.metrics.failed == NUM_ROWS // 200
    assert summary.model_loads == summary.workers == 2
    assert summary.metrics.computed_prompt_tokens <= 1.05 * metrics.computed_prompt_tokens
    assert summary.computed_alone == metrics.computed_prompt_tokens
    df.count()  # computed once more, and counted once
    assert summary.metrics.rows == NUM_ROWS


def test_an_executor_that_is_killed_loses_nothing(spark, files, table):
    expected, _ = alone(table, max_tokens=40, temperature=1.0, seed=5)
    summary = Summary()
    options = {"max_tokens": 40, "temperature": 1.0, "seed": 5, "num_partitions": 8}
    # Row numbers go by Spark's order of the files, so that order is made the table's.
    ordered = spark.createDataFrame(table)
    df = generate(ordered, summary=summary, model="fake", template=TEMPLATE, **options)
    killed = []

    def kill():
        while not summary.partitions:
            time.sleep(0.02)
        report = next(iter(summary.partitions.values()))
        executor = psutil.Process(report.loaded.process).parent().parent()
        assert "CoarseGrainedExecutorBackend" in " ".join(executor.cmdline())
        os.kill(executor.pid, signal.SIGKILL)
        killed.append(executor.pid)

    killer = Thread(target=kill)
    killer.start()
    got = df.toArrow()
    killer.join()
    assert killed
    assert got["id"].to_pylist() == list(range(NUM_ROWS))
    assert got.select(RESULTS).to_pylist() == expected.select(RESULTS).to_pylist()
    assert sorted(summary.partitions) == list(range(8)) and summary.metrics.rows == NUM_ROWS


def test_rows_of_a_shuffled_table_are_all_there_once(spark, files, table):
    expected, metrics = alone(table, max_tokens=3)
    summary = Summary()
    many = generate(
        files.select("doc", "id", "q").repartition(3, "q"),
        summary=summary,
        model="fake",
        template=TEMPLATE,
        max_tokens=3,
        window_rows=500,
    )
    assert many.rdd.getNumPartitions() == 3
    got = many.toArrow().sort_by("id")
    assert got.select(["id", *RESULTS]).equals(
        expected.select(["id", *RESULTS]).cast(got.select(["id", *RESULTS]).schema)
    )
    assert summary.metrics.windows >= 12
    assert summary.metrics.computed_prompt_tokens <= 1.05 * metrics.computed_prompt_tokens


def test_a_table_without_rows(spark, files):
    none = generate(files.limit(0), model="fake", template=TEMPLATE)
    assert none.collect() == [] and none.columns[-6:-4] == ["answer", "finish_reason"]


def test_what_makes_no_sense_is_refused_before_anything_runs(files):
    with pytest.raises(UsageError, match="did you mean 'template'"):
        generate(files, model="fake", templat=TEMPLATE)
    with pytest.raises(UsageError, match="nothere"):
        generate(files, model="fake", prompt_column="nothere")
    with pytest.raises(UsageError, match="nothere"):
        generate(files, model="fake", prompt_col="nothere")
    with pytest.raises(UsageError, match="are the same; give one"):
        generate(files, model="fake", prompt_col="q", prompt_column="q")
    with pytest.raises(UsageError, match="has a column 'doc'"):
        generate(files, model="fake", prompt_column="q", output_column="doc")


def test_a_function_for_sql(spark, files, table):
    expected, _ = alone(table, max_tokens=5)
    function = register_function(spark, "ask", model="fake", max_tokens=5)
    files.createOrReplaceTempView("questions")
    got = spark.sql(r"SELECT id, ask(concat(doc, '\n', q)) AS answer FROM questions").toArrow()
    assert got.sort_by("id")["answer"].to_pylist() == expected["answer"].to_pylist()
    some = files.where("id < 9").select("id", function(F.concat_ws("\n", "doc", "q"))).toArrow()
    wanted = expected["answer"].to_pylist()[:9]
    fine = [i for i in range(9) if i != 3]
    assert [dict(some.sort_by("id").to_pydict())[some.column_names[1]][i] for i in fine] == [
        wanted[i] for i in fine
    ]
    with pytest.raises(UsageError, match="the function's argument is the prompt"):
        register_function(spark, template=TEMPLATE)


def test_a_model_that_was_shipped_is_found_on_every_worker(
    spark, files, table, tiny_model, tmp_path
):
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", tiny_model)
    spark.sparkContext.addArchive(f"{packed}#shipped")
    options = {"chat": False, "dtype": "float32", "max_tokens": 4}
    some = files.select("id", "q").where("id < 60")
    got = generate(some, model="shipped", prompt_col="q", kv_memory=1 << 24, **options).toArrow()
    llm = LLM(tiny_model, dtype="float32", kv_memory=1 << 24)
    expected = llm.generate(
        table.slice(0, 60), SamplingParams(max_tokens=4), prompt_column="q", chat=False
    )
    assert got.sort_by("id")["answer"].to_pylist() == expected["answer"].to_pylist()


def test_a_task_sees_the_gpus_that_its_profile_asks_for(files):
    profile = gpu_profile(1)
    some = files.where("id < 100")
    options = {"template": TEMPLATE, "max_tokens": 3}
    df = generate(some, model="fake", resource_profile=profile, **options)
    assert df.count() == 100

    def visible(batches):
        for _ in batches:
            pass
        yield pa.record_batch({"gpus": [os.environ.get("CUDA_VISIBLE_DEVICES")]})

    seen = some.select("id").mapInArrow(visible, "gpus string", profile=profile).collect()
    assert "5" in {row.gpus for row in seen}


def test_the_guide_runs(tmp_path, monkeypatch, spark):
    # Its session is the one that is there, and it stops it: the last test here.
    run_guide("SPARK.md", tmp_path, monkeypatch)
