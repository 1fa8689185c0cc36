"""`batchllm.spark` where Spark runs slow tasks a second time, on another worker."""

import shutil
import time
from contextlib import suppress
from threading import Thread

import psutil
import pytest
from process_checks import hard_limit
from spark_cluster import NUM_ROWS, RESULTS, TEMPLATE, alone, questions, session_on, standalone

pytest.importorskip("pyspark")
from batchllm.spark import Summary, generate

pytestmark = [
    pytest.mark.spark,
    pytest.mark.skipif(shutil.which("java") is None, reason="no java"),
    pytest.mark.filterwarnings("ignore"),  # Spark's and pandas' own
]
SPECULATION = {
    # A session before this one leaves what it was configured with to the process.
    "spark.executor.resource.gpu.amount": "0",
    "spark.task.resource.gpu.amount": "0",
    "spark.speculation": "true",
    "spark.speculation.interval": "100ms",
    "spark.speculation.multiplier": "1.1",
    "spark.speculation.quantile": "0.5",
    "spark.speculation.minTaskRuntime": "500ms",
}


@pytest.fixture
def spark(tmp_path):
    # A task is only run again on another host, so the workers have two names of this one.
    with (
        standalone(tmp_path, ["localhost", "127.0.0.1"]) as master,
        session_on(master, tmp_path, SPECULATION) as session,
    ):
        yield session


@pytest.mark.usefixtures(hard_limit.__name__)
def test_a_task_that_runs_twice_gives_its_rows_once(spark):
    """A worker's process stands still from its first report on; its task ends elsewhere."""
    table, params = questions(), {"max_tokens": 40, "temperature": 1.0, "seed": 5}
    expected, _ = alone(table, **params)
    summary = Summary()
    df = generate(
        spark.createDataFrame(table),
        summary=summary,
        model="fake",
        template=TEMPLATE,
        num_partitions=8,
        **params,
    )
    stopped = []

    def stop():
        while not summary.partitions:
            time.sleep(0.02)
        report = next(iter(summary.partitions.values()))
        stopped.append(psutil.Process(report.loaded.process))
        stopped[0].suspend()

    stopper = Thread(target=stop)
    stopper.start()
    try:
        got = df.toArrow()
        assert stopped[0].status() == psutil.STATUS_STOPPED
    finally:
        stopper.join()
        with suppress(psutil.NoSuchProcess):
            stopped[0].kill()
    assert got["id"].to_pylist() == list(range(NUM_ROWS))
    assert got.select(RESULTS).to_pylist() == expected.select(RESULTS).to_pylist()
    assert sorted(summary.partitions) == list(range(8)) and summary.metrics.rows == NUM_ROWS
