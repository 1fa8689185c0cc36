"""Spark: `generate` answers a DataFrame on a cluster's executors, rows that share kept together.

The DataFrame is read three times before anything is answered: a few rows of each partition are
sampled, prompts are counted, and every row is placed. Rows then go to partitions of consecutive
prompts that take about as long each, are answered there, and go back to where they came from. Only
the last two belong to the DataFrame that comes out, and they run when it is written or collected,
each time anew: write it once, or persist it.

Python workers live on between tasks, and each keeps the model it has loaded.
"""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import pyarrow as pa

from batchllm.errors import UsageError
from batchllm.integrations.call import PLACE, ROW, GenerateCall
from batchllm.integrations.passes import Ranges, Sample
from batchllm.integrations.summary import Summary
from batchllm.integrations.survey import expected, sample_size, survey
from batchllm.prefix.balance import Partitions
from batchllm.prefix.tally import Tally

try:
    import pandas as pd
    from pyspark.errors import PySparkException
    from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql import functions as F
    from pyspark.sql.pandas.functions import pandas_udf
    from pyspark.sql.pandas.types import from_arrow_schema
    from pyspark.sql.types import LongType, StringType, StructField, StructType

    from batchllm.integrations.spark_cluster import labels_of, num_tasks, tasks_on_a_host
    from batchllm.integrations.spark_tasks import (
        TO,
        Answering,
        Counting,
        Placing,
        Renamed,
        Reports,
        Sampling,
        Task,
        answer_column,
        with_shipped_model,
    )
except ImportError as error:
    raise UsageError(
        f"no Spark can be used here ({error}); pip install 'batchllm[spark]'"
    ) from error

__all__ = ["Summary", "generate", "gpu_profile", "register_function"]

_SOURCES = ("prompt_column", "messages_column", "token_ids_column", "template", "max_tokens_column")


def generate(
    df: DataFrame,
    *,
    summary: Summary | None = None,
    num_partitions: int | None = None,
    workers: int | None = None,
    machine: str | None = None,
    resource_profile: ResourceProfile | None = None,
    prompt_col: str | None = None,
    **options: Any,
) -> DataFrame:
    """Answer the rows of a DataFrame.

    Args:
        df: rows in any order; it must give the same rows whenever it is read.
        summary: filled in when the answers have been computed.
        num_partitions: how many partitions to answer; None is one a worker for small tables, else
            a large one for each and smaller ones that even out what was guessed wrong.
        workers: how many tasks answer side by side; None is as many as the cluster runs now.
        machine: what a worker is like for the cost model, such as "h100"; None is like the driver.
        resource_profile: of the tasks that answer, see `gpu_profile`.
        prompt_col: `prompt_column`, as Spark's own functions abbreviate it.
        **options: a `model` (a path that all can read, the name of a shipped file or directory, a
            hub id), the prompt's source, and fields of `SamplingParams` and `EngineConfig`; see
            `GenerateCall.of_options`.

    Returns:
        The rows with the answer columns, in the order and the partitions they came in. It is lazy
        and computed anew by each action, unless it is persisted.

    Raises:
        UsageError: an argument makes no sense, or a column is missing.
    """
    if prompt_col is not None:
        if "prompt_column" in options:
            raise UsageError("prompt_col and prompt_column are the same; give one")
        options["prompt_column"] = prompt_col
    call = GenerateCall.of_options(**options)
    schema = _arrow_schema(df)
    added = from_arrow_schema(call.check(schema).schema)
    session = df.sparkSession
    workers = workers or num_tasks(session)
    call = _shared(call, tasks_on_a_host(session, workers))
    num_inputs = df.rdd.getNumPartitions()
    names = schema.names
    plain = df.toDF(*(f"c{i}" for i in range(len(names))))  # any name, to whatever Spark does
    needed = [i for i, name in enumerate(names) if name in call.spec.columns_of(schema)] or [0]
    few = _Named(plain.select(*(f"c{i}" for i in needed)), [names[i] for i in needed])
    ranges, partitions = _look(few, call, workers, num_inputs, num_partitions, machine)
    if partitions is None:
        return df.select("*", *(F.lit(None).cast(f.dataType).alias(f.name) for f in added))
    if summary is not None:
        summary.clear()
        summary.expected = expected(partitions)
    reports = None if summary is None else session.sparkContext.accumulator(summary, Reports())
    there, back = (labels_of(session, n) for n in (partitions.count, num_inputs))
    placing = Placing(ranges, there[partitions.of_range])
    answering = Answering(ranges.call, ranges.first_row, back, reports)
    answered = (
        plain.mapInArrow(
            Renamed(placing, names), StructType([*plain.schema, *_longs(ROW, PLACE, TO)])
        )
        .repartition(partitions.count, TO)
        .sortWithinPartitions(PLACE)
        .drop(TO)
        .mapInArrow(
            Renamed(answering, names),
            StructType([*plain.schema, *added, *_longs(ROW, TO)]),
            profile=resource_profile,
        )
        .repartition(num_inputs, TO)
        .sortWithinPartitions(ROW)
        .drop(ROW, TO)
    )
    return answered.toDF(*names, *added.names)


def register_function(
    session: SparkSession, name: str = "batchllm", **options: Any
) -> Callable[..., Column]:
    """Register a function for SQL: `SELECT batchllm(prompt) FROM …`; returns it for Python.

    It answers a text with a text, null where the row failed or the prompt is null. Each partition
    is planned by itself, as it comes: prefixes are computed again in every partition that has them,
    partitions take as long as they happen to, there is no summary, and why a row failed is not
    told. `generate` does all of that.

    Args:
        session: of Spark.
        name: what it is called in SQL.
        **options: as for `generate`, less the prompt's source.

    Raises:
        UsageError: an option makes no sense.
    """
    if sources := [key for key in options if key in _SOURCES]:
        raise UsageError(f"{sources[0]} is given, but the function's argument is the prompt")
    call = GenerateCall.of_options(prompt_column="prompt", **options)
    share = tasks_on_a_host(session, num_tasks(session))
    call = _shared(call, share)

    def answer(columns: Iterator[pd.Series]) -> Iterator[pd.Series]:  # Spark goes by these types
        yield from answer_column(call, columns)

    make = cast("Callable[..., Callable[..., Column]]", pandas_udf)  # its stubs know no iterators
    function = make(answer, StringType())
    session.udf.register(name, function)
    return function


def gpu_profile(num_gpus: int = 1, cpus: int = 1) -> ResourceProfile:
    """What a task that answers asks of its executor: GPUs, and CPUs.

    Executors must have been started with GPUs (`spark.executor.resource.gpu.amount`). With as many
    GPUs as `tensor_parallel_size`, one task runs a model on all of them: its processes are on one
    machine, so no barrier stage is needed. Where it asks for all of an executor's CPUs, one such
    task runs there at a time, and the model is loaded once.
    """
    requests = TaskResourceRequests().cpus(cpus)
    if num_gpus:
        requests = requests.resource("gpu", num_gpus)
    return ResourceProfileBuilder().require(requests).build


@dataclass(frozen=True, slots=True)
class _Named:
    """A DataFrame whose columns have plain names, and their real ones."""

    plain: DataFrame
    names: list[str]

    def run(self, task: Task) -> dict[int, Any]:
        """What a pass finds in each partition that has rows, by the partition's number."""
        rows = self.plain.mapInArrow(
            Renamed(task, self.names), "__batchllm_partition bigint, __batchllm_found binary"
        ).collect()
        return {row[0]: pickle.loads(row[1]) for row in rows}


def _look(
    few: _Named,
    call: GenerateCall,
    workers: int,
    num_inputs: int,
    num_partitions: int | None,
    machine: str | None,
) -> tuple[Ranges, Partitions | None]:
    """The passes before anything is answered; no partitions where there are no rows.

    `few` has only the columns that prompts are made of.
    """
    samples = few.run(Sampling(sample_size(num_inputs, workers, call.window_rows)))
    nothing = Sample(pa.table({}), 0)  # Spark does not call for empty partitions
    looked = survey(
        with_shipped_model(call),
        [samples.get(number, nothing) for number in range(num_inputs)],
        workers,
        num_partitions=num_partitions,
        machine=machine,
    )
    # Workers look for a shipped model where they are.
    ranges = replace(looked.ranges, call=replace(looked.ranges.call, model=call.model))
    if looked.num_rows == 0:
        return ranges, None
    tallies: dict[int, Tally] = few.run(Counting(ranges))
    return ranges, looked.partitions(list(tallies.values()))


def _shared(call: GenerateCall, share: int) -> GenerateCall:
    """The call, for a worker that has one of so many equal shares of its machine."""
    if call.config.machine_share != 1:  # as the user says
        return call
    return replace(call, config=replace(call.config, machine_share=share))


def _arrow_schema(df: DataFrame) -> pa.Schema:
    try:
        return df.limit(0).toArrow().schema
    except PySparkException as error:
        raise UsageError(f"a column cannot be read by way of Arrow: {error}") from error


def _longs(*names: str) -> list[StructField]:
    return [StructField(name, LongType(), nullable=False) for name in names]
