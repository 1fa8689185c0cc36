"""Local Spark clusters of real processes, and the table that is answered on them."""

import datetime
import os
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from batchllm import LLM, SamplingParams

TEMPLATE = "{{ doc }}\n{{ q }}"
RESULTS = ["answer", "finish_reason", "prompt_tokens", "output_tokens", "error"]
NUM_ROWS = 6000
SHORT_LIVED = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"  # a JVM that compiles less is ready sooner


@contextmanager
def session_on(master, scratch, config):
    """A session; `scratch` is where everything goes that it writes."""
    from pyspark.sql import SparkSession

    os.environ |= {
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    builder = SparkSession.builder.master(master)
    for name, value in {
        "spark.ui.enabled": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.extraJavaOptions": SHORT_LIVED,
        "spark.executor.extraJavaOptions": SHORT_LIVED,
        "spark.executor.memory": "512m",
        "spark.sql.shuffle.partitions": "2",
        "spark.sql.warehouse.dir": str(scratch),
        "spark.local.dir": str(scratch),
        **config,
    }.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    try:
        yield session
    finally:
        session.stop()


@contextmanager
def standalone(scratch, hosts):
    """A standalone cluster with a worker of one core on each of this machine's names `hosts`."""
    import pyspark

    command = Path(pyspark.__file__).parent / "bin" / "spark-class"
    package, port = "org.apache.spark.deploy", _free_port()
    environment = os.environ | {
        "SPARK_DAEMON_JAVA_OPTS": SHORT_LIVED,
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    with ExitStack() as stack:
        log = stack.enter_context((scratch / "log").open("w"))

        def start(kind, *options):
            process = subprocess.Popen(
                [str(command), f"{package}.{kind}", *options, "--webui-port", "0"],
                stdout=log,
                stderr=log,
                env=environment,
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)

        start("master.Master", "--host", hosts[0], "--port", str(port))
        master = f"spark://{hosts[0]}:{port}"
        for host in hosts:
            work = ["--work-dir", str(scratch / host)]
            start("worker.Worker", master, "--host", host, "--cores", "1", "--memory", "1g", *work)
        yield master


def questions():
    """Questions about documents, shuffled, with columns of other types beside them."""
    rng = np.random.default_rng(0)
    docs = [f"document {i} " + " ".join(map(str, rng.integers(0, 999, 60))) for i in range(60)]
    of = rng.zipf(1.4, NUM_ROWS) % 60
    day = datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.UTC)
    return pa.table(
        {
            "id": np.arange(NUM_ROWS),
            "doc": [docs[i] for i in of],
            "q": [None if i % 200 == 3 else f"question {i % 700}?" for i in range(NUM_ROWS)],
            "when": pa.array([day] * NUM_ROWS, pa.timestamp("us", "UTC")),
            "tags": pa.array([["a", None]] * NUM_ROWS, pa.list_(pa.string())),
            "strange `name`": pa.array([{"x": 1.5}] * NUM_ROWS, pa.struct([("x", pa.float64())])),
        }
    )


def alone(table, **params):
    """What one engine answers, and what it counts."""
    llm = LLM("fake")
    return llm.generate(table, SamplingParams(**params), template=TEMPLATE), llm.metrics


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
