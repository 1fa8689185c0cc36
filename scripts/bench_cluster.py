"""What processes of a cluster compute that one would not, by engine; with the model `fake`.

Each table is answered by one process, by the engine's integration, and by the same call on each of
the engine's own partitions, as they come. A table has its documents' rows shuffled.

    .venv/bin/python scripts/bench_cluster.py spark [--rows 200000] [--workers 2 4]

The workloads `tools` and `documents` are there where `scripts/text_workloads.sh` has made them.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchllm import LLM
from batchllm.integrations.call import GenerateCall
from batchllm.integrations.summary import Summary

FILES = 16  # that a table is in, one partition each
DATA = Path(__file__).parents[1] / ".bench" / "data"
TEXTS = {
    "tools": "{{ functions }}\n\n{{ question }}",
    "documents": "{{ doc_head }}\n\n{{ chapter_text }}\n\nOne passage of it:\n{{ section_text }}"
    "\n\n{{ question }}",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an engine did: the answers in the input's order, and tokens computed by either way."""

    answers: list[str]
    summary: Summary
    computed_by_default: int


@dataclass(frozen=True, slots=True)
class Workload:
    """A table with a column `id`, and how its prompts are made."""

    name: str
    table: pa.Table
    template: str

    @property
    def options(self) -> dict[str, Any]:
        """Of `generate`."""
        return {"model": "fake", "template": self.template, "max_tokens": 8}


Engine = Callable[[Path, int, Workload], Outcome]
"""Takes the folder of a table's files, how many worker processes, and what is asked; only there is
the engine imported."""


def on_spark(folder: Path, workers: int, work: Workload) -> Outcome:
    """A standalone cluster of this machine's processes, with executors of one core each."""
    os.environ |= {
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_LOCAL_HOSTNAME": "localhost",
    }
    from pyspark.sql import SparkSession

    from batchllm.spark import generate

    session = (
        SparkSession.builder.master(f"local-cluster[{workers},1,1024]")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.executor.memory", "512m")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.files.openCostInBytes", str(128 << 20))  # a partition for each file
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("OFF")
    frame = session.read.parquet(str(folder))
    summary = Summary()
    answered = generate(frame, summary=summary, **work.options).select("id", "answer").toArrow()

    def alone(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for table in [pa.Table.from_batches(list(batches))]:
            yield pa.record_batch({"computed": [count(table, work.options)]})

    default = sum(row.computed for row in frame.mapInArrow(alone, "computed long").collect())
    session.stop()
    return Outcome(answered.sort_by("id")["answer"].to_pylist(), summary, default)


def on_ray(folder: Path, workers: int, work: Workload) -> Outcome:
    """A local cluster with as many actors."""
    import ray

    from batchllm.ray import generate

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.DataContext.get_current().wait_for_min_actors_s = 300
    dataset = ray.data.read_parquet(str(folder), override_num_blocks=FILES)
    summary = Summary()
    answered = generate(dataset, summary=summary, workers=workers, **work.options)
    answers = pa.concat_tables(ray.get(answered.to_arrow_refs())).sort_by("id")["answer"]

    def alone(table: pa.Table) -> pa.Table:
        return pa.table({"computed": [count(table, work.options)]})

    counted = dataset.map_batches(alone, batch_size=None, batch_format="pyarrow").take_all()
    ray.shutdown()
    return Outcome(answers.to_pylist(), summary, sum(row["computed"] for row in counted))


def on_dask(folder: Path, workers: int, work: Workload) -> Outcome:
    """A cluster of this machine's processes."""
    import dask.dataframe as frames
    import distributed

    from batchllm.dask import generate

    cluster = distributed.LocalCluster(
        n_workers=workers, threads_per_worker=1, dashboard_address=":0", memory_limit=0
    )
    with cluster, distributed.Client(cluster):
        frame = frames.read_parquet(folder)
        summary = Summary()
        answers = generate(frame, summary=summary, **work.options)["answer"].compute().tolist()
        default = frame.map_partitions(
            count_frame, work.options, meta={"computed": "int64"}
        ).compute()
    return Outcome(answers, summary, int(default["computed"].sum()))


ENGINES: dict[str, Engine] = {"spark": on_spark, "dask": on_dask, "ray": on_ray}


def count_frame(frame: Any, options: dict[str, Any]) -> Any:  # noqa: ANN401
    """Of pandas: the tokens that answering it computes, as a frame."""
    import pandas as pd

    table = pa.Table.from_pandas(frame, preserve_index=False)
    return pd.DataFrame({"computed": [count(table, options)]})


def count(table: pa.Table, options: dict[str, Any]) -> int:
    """The prompt tokens that are computed where a partition is answered for itself."""
    from batchllm.integrations.held import HOLDER  # the worker's, which does not travel

    call = GenerateCall.of_options(**options)
    with HOLDER.use(call) as (llm, _):
        before = llm.metrics.computed_prompt_tokens
        llm.generate_table(table, call.spec, call.params)
        return llm.metrics.computed_prompt_tokens - before


def workloads(num_rows: int) -> Iterator[Workload]:
    """Documents under 100 questions each, alike or of few that have most rows; and real texts."""
    rng = np.random.default_rng(0)
    words = [f"w{i:x}" for i in range(5000)]
    documents = pa.array([" ".join(rng.choice(words, 60)) for _ in range(2000)])
    questions = pa.array([" ".join(rng.choice(words, 8)) + "?" for _ in range(100)])
    uniform = rng.permutation(num_rows)
    asked = {
        "2,000 documents, 100 questions each": (uniform % 2000, uniform // 2000 % 100),
        "2,000 documents, zipf(1.2)": (
            rng.zipf(1.2, num_rows) % 2000,
            rng.integers(0, 100, num_rows),
        ),
    }
    for name, (document, question) in asked.items():
        table = pa.table(
            {
                "id": np.arange(num_rows),
                "document": documents.take(pa.array(document)),
                "question": questions.take(pa.array(question)),
            }
        )
        yield Workload(name, table, "{{ document }}\n\n{{ question }}")
    for name, template in TEXTS.items():
        if (path := DATA / f"{name}.parquet").exists():
            table = pq.read_table(path)
            columns = [column for column in table.column_names if column != "id"]
            numbered = table.select(columns).append_column("id", pa.array(range(len(table))))
            yield Workload(f"`{name}`, {len(table):,} rows", numbered, template)


def measure(engine: Engine, work: Workload, workers: list[int]) -> Iterator[str]:
    """The rest of the lines of a workload's rows."""
    call = GenerateCall.of_options(**work.options)
    llm = LLM(call.model.open(), call.config)
    expected = llm.generate_table(work.table, call.spec, call.params)["answer"].to_pylist()
    alone = llm.metrics.computed_prompt_tokens
    with tempfile.TemporaryDirectory() as folder:
        size = -(-work.table.num_rows // FILES)
        for i in range(FILES):
            pq.write_table(work.table.slice(i * size, size), Path(folder) / f"{i:03}.parquet")
        for count_of in workers:
            done = engine(Path(folder), count_of, work)
            assert done.answers == expected, "answers differ from those of one process"
            ours = done.summary.metrics.computed_prompt_tokens
            yield (
                f"| {count_of} | {alone:,} | {ours:,} | {ours / alone:.4f} | "
                f"{done.computed_by_default / alone:.3f} | {done.summary.model_loads} |"
            )


def main() -> None:
    """Print a table in markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    print(
        "| table | workers | alone | computed | ratio | "
        f"{args.engine}'s own partitions | model loads |\n|---|---|---|---|---|---|---|"
    )
    for work in workloads(args.rows):
        for line in measure(ENGINES[args.engine], work, args.workers):
            print(f"| {work.name} {line}", flush=True)


if __name__ == "__main__":
    main()
