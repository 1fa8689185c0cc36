"""What processes of a cluster compute that one would not, by engine; with the model `fake`.

Each table is answered by one process, by the engine's integration, and by the same call on each of
the engine's own partitions, as they come. A table has its documents' rows shuffled.

    .venv/bin/python scripts/bench_cluster.py dask [--rows 200000] [--workers 2 4]
"""

import argparse
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
OPTIONS: dict[str, Any] = {
    "model": "fake",
    "template": "{{ document }}\n\n{{ question }}",
    "max_tokens": 8,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an engine did: the answers in the input's order, and tokens computed by either way."""

    answers: list[str]
    summary: Summary
    computed_by_default: int


Engine = Callable[[Path, int], Outcome]
"""Takes the folder of a table and how many worker processes; only there is the engine imported."""


def on_dask(folder: Path, workers: int) -> Outcome:
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
        answers = generate(frame, summary=summary, **OPTIONS)["answer"].compute().tolist()
        default = frame.map_partitions(count_frame, meta={"computed": "int64"}).compute()
    return Outcome(answers, summary, int(default["computed"].sum()))


ENGINES: dict[str, Engine] = {"dask": on_dask}


def count_frame(frame: Any) -> Any:  # noqa: ANN401
    """Of pandas: the tokens that answering it computes, as a frame."""
    import pandas as pd

    return pd.DataFrame({"computed": [count(pa.Table.from_pandas(frame, preserve_index=False))]})


def count(table: pa.Table) -> int:
    """The prompt tokens that are computed where a partition is answered for itself."""
    from batchllm.integrations.held import HOLDER  # the worker's, which does not travel

    call = GenerateCall.of_options(**OPTIONS)
    with HOLDER.use(call) as (llm, _):
        before = llm.metrics.computed_prompt_tokens
        llm.generate_table(table, call.spec, call.params)
        return llm.metrics.computed_prompt_tokens - before


def tables(num_rows: int) -> Iterator[tuple[str, pa.Table]]:
    """2,000 documents under 100 questions each, and documents of which few have most rows."""
    rng = np.random.default_rng(0)
    words = [f"w{i:x}" for i in range(5000)]
    documents = pa.array([" ".join(rng.choice(words, 60)) for _ in range(2000)])
    questions = pa.array([" ".join(rng.choice(words, 8)) + "?" for _ in range(100)])
    uniform = rng.permutation(num_rows)
    yield (
        "2,000 documents, 100 questions each",
        table_of(documents, questions, uniform % 2000, uniform // 2000 % 100),
    )
    zipf = rng.zipf(1.2, num_rows) % 2000
    yield (
        "2,000 documents, zipf(1.2)",
        table_of(documents, questions, zipf, rng.integers(0, 100, num_rows)),
    )


def table_of(documents: pa.Array, questions: pa.Array, of: Any, asked: Any) -> pa.Table:  # noqa: ANN401
    """Rows by the numbers of their document and question."""
    return pa.table(
        {
            "id": np.arange(len(of)),
            "document": documents.take(pa.array(of)),
            "question": questions.take(pa.array(asked)),
        }
    )


def measure(engine: Engine, table: pa.Table, workers: list[int]) -> Iterator[str]:
    """The rest of the lines of a table's rows."""
    call = GenerateCall.of_options(**OPTIONS)
    llm = LLM(call.model.open(), call.config)
    expected = llm.generate_table(table, call.spec, call.params)["answer"].to_pylist()
    alone = llm.metrics.computed_prompt_tokens
    with tempfile.TemporaryDirectory() as folder:
        size = -(-table.num_rows // FILES)
        for i in range(FILES):
            pq.write_table(table.slice(i * size, size), Path(folder) / f"{i:03}.parquet")
        for count_of in workers:
            done = engine(Path(folder), count_of)
            ours = done.summary.metrics.computed_prompt_tokens
            assert done.answers == expected, "answers differ from those of one process"
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
    for name, table in tables(args.rows):
        for line in measure(ENGINES[args.engine], table, args.workers):
            print(f"| {name} {line}", flush=True)


if __name__ == "__main__":
    main()
