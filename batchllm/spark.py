"""Spark: `generate` answers a DataFrame on a cluster's executors, rows that share kept together.

The DataFrame is read three times before anything is answered: a few rows of each partition are
sampled, prompts are counted, and every row is placed. Rows then go to partitions of consecutive
prompts that take about as long each, are answered there, and go back to where they came from. Only
the last two belong to the DataFrame that comes out, and they run when it is written or collected,
each time anew: write it once, or persist it.

Python workers live on between tasks, and each keeps the model it has loaded.
"""

import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any, cast

import numpy as np
import pyarrow as pa

from batchllm.errors import UsageError
from batchllm.integrations.answer import PartitionRun
from batchllm.integrations.call import PLACE, ROW, GenerateCall
from batchllm.integrations.passes import (
    Ranges,
    Sample,
    count_rows,
    place_rows,
    sample_rows,
    with_columns,
)
from batchllm.integrations.summary import Summary
from batchllm.integrations.survey import expected, sample_size, survey
from batchllm.prefix.balance import Partitions
from batchllm.prefix.partition import Ints
from batchllm.prefix.tally import Tally

try:
    import pandas as pd
    from pyspark import Accumulator, AccumulatorParam, TaskContext
    from pyspark.errors import PySparkException
    from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql import functions as F
    from pyspark.sql.pandas.functions import pandas_udf
    from pyspark.sql.pandas.types import from_arrow_schema
    from pyspark.sql.types import LongType, StringType, StructField, StructType
except ImportError as error:
    raise UsageError(
        f"Spark cannot be used here ({error}); pip install 'batchllm[spark]'"
    ) from error

__all__ = ["Summary", "generate", "gpu_profile", "register_function"]

_TO = "__batchllm_to"
"""The column of an integer that hashes to the partition a row goes to next."""
_SOURCES = ("prompt_column", "messages_column", "token_ids_column", "template", "max_tokens_column")
_TRIES = 64  # integers looked at for each partition, to find one that hashes to it
_VISIBLE = "CUDA_VISIBLE_DEVICES"
Batches = Iterable[pa.RecordBatch]
Task = Callable[[Batches], Iterator[pa.RecordBatch]]


def generate(
    df: DataFrame,
    *,
    summary: Summary | None = None,
    num_partitions: int | None = None,
    workers: int | None = None,
    machine: str | None = None,
    resource_profile: ResourceProfile | None = None,
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
        **options: a `model`, the prompt's source, and fields of `SamplingParams` and
            `EngineConfig`; see `GenerateCall.of_options`.

    Returns:
        The rows with the answer columns, in the order and the partitions they came in. It is lazy
        and computed anew by each action, unless it is persisted.

    Raises:
        UsageError: an argument makes no sense, or a column is missing.
    """
    call = GenerateCall.of_options(**options)
    schema = _arrow_schema(df)
    added = from_arrow_schema(call.check(schema).schema)
    session = df.sparkSession
    workers = workers or _num_tasks(session)
    call = _shared(call, _tasks_on_a_host(session, workers))
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
    reports = None if summary is None else session.sparkContext.accumulator(summary, _Reports())
    there, back = (_labels(session, n) for n in (partitions.count, num_inputs))
    placing = _Placing(ranges, there[partitions.of_range])
    answering = _Answering(ranges.call, ranges.first_row, back, reports)
    answered = (
        plain.mapInArrow(
            _Renamed(placing, names), StructType([*plain.schema, *_longs(ROW, PLACE, _TO)])
        )
        .repartition(partitions.count, _TO)
        .sortWithinPartitions(PLACE)
        .drop(_TO)
        .mapInArrow(
            _Renamed(answering, names),
            StructType([*plain.schema, *added, *_longs(ROW, _TO)]),
            profile=resource_profile,
        )
        .repartition(num_inputs, _TO)
        .sortWithinPartitions(ROW)
        .drop(ROW, _TO)
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
    share = _tasks_on_a_host(session, _num_tasks(session))
    call = _shared(call, share)

    def answer(columns: Iterator[pd.Series]) -> Iterator[pd.Series]:  # Spark goes by these types
        yield from _answer_column(call, columns)

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
            _Renamed(task, self.names), "partition bigint, found binary"
        ).collect()
        return {row.partition: pickle.loads(row.found) for row in rows}


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
    samples = few.run(_Sampling(sample_size(num_inputs, workers, call.window_rows)))
    nothing = Sample(pa.table({}), 0)  # Spark does not call for empty partitions
    looked = survey(
        call,
        [samples.get(number, nothing) for number in range(num_inputs)],
        workers,
        num_partitions=num_partitions,
        machine=machine,
    )
    if looked.num_rows == 0:
        return looked.ranges, None
    tallies: dict[int, Tally] = few.run(_Counting(looked.ranges))
    return looked.ranges, looked.partitions(list(tallies.values()))


@dataclass(frozen=True, slots=True)
class _Renamed:
    """A task on columns by their real names; Spark's own plans cannot read all of those.

    Columns behind the named ones are ours, and keep their names.
    """

    task: Task
    names: list[str]

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        size = len(self.names)
        plain = [f"c{i}" for i in range(size)]
        for batch in self.task(_renamed(batches, self.names)):
            is_table = batch.schema.names[:size] == self.names
            yield _rename(batch, plain) if is_table else batch


def _found(partition: int, found: object) -> pa.RecordBatch:
    return pa.record_batch({"partition": [partition], "found": [pickle.dumps(found)]})


@dataclass(frozen=True, slots=True)
class _Sampling:
    size: int

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        number = _partition_id()
        batches = iter(batches)
        if (first := next(batches, None)) is not None:
            names = first.schema.names
            yield _found(number, sample_rows(chain([first], batches), names, self.size, number))


@dataclass(frozen=True, slots=True)
class _Counting:
    ranges: Ranges

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        number = _partition_id()
        yield _found(number, count_rows(batches, self.ranges, number))


@dataclass(frozen=True, slots=True)
class _Placing:
    """`labels` [num_ranges] are integers that hash to the ranges' partitions."""

    ranges: Ranges
    labels: Ints

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        for batch in place_rows(batches, self.ranges, _partition_id()):
            yield with_columns(batch, {_TO: self.labels[batch.column(PLACE).to_numpy()]})


@dataclass(frozen=True, slots=True)
class _Answering:
    """`first_row` is of the input's partitions, `labels` are integers that hash to them."""

    call: GenerateCall
    first_row: Ints
    labels: Ints
    reports: "Accumulator[Summary] | None"

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        run = PartitionRun(_on_this_worker(self.call), _partition_id())
        for batch in run.answer(batches):
            home = np.searchsorted(self.first_row, batch.column(ROW).to_numpy(), "right") - 1
            yield with_columns(batch, {_TO: self.labels[home]})
        if self.reports is not None:
            self.reports.add(Summary({run.partition: run.report}))


def _answer_column(call: GenerateCall, columns: Iterator[pd.Series]) -> Iterator[pd.Series]:
    """A partition's prompts answered together, in the pieces they came in."""
    prompts = [pa.array(column.tolist(), pa.string()) for column in columns]
    starts = np.cumsum([0, *map(len, prompts)])
    table = pa.table({"prompt": pa.chunked_array(prompts, pa.string())})
    numbered = table.append_column(ROW, pa.array(np.arange(starts[-1])))
    run = PartitionRun(_on_this_worker(call), _partition_id())
    answered = pa.Table.from_batches(run.answer(numbered.to_batches()), call.answered(table.schema))
    answers = answered.sort_by(ROW)[call.output_column]
    for begin, end in pairwise(starts.tolist()):
        yield answers.slice(begin, end - begin).to_pandas()


class _Reports(AccumulatorParam[Summary]):
    """Reports of tasks, taken in by partition: a task that ran twice counts once."""

    def zero(self, value: Summary) -> Summary:
        return Summary()

    def addInPlace(self, value1: Summary, value2: Summary) -> Summary:  # noqa: N802  # Spark's
        value1.add(value2.partitions.values())
        return value1


def _on_this_worker(call: GenerateCall) -> GenerateCall:
    """The call with the GPUs and the threads that Spark has given to this task."""
    context = TaskContext.get()
    if context is not None and (gpus := context.resources().get("gpu")) is not None:
        os.environ[_VISIBLE] = ",".join(gpus.addresses)  # before CUDA is first used here
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if call.config.threads is not None or not threads.isdecimal():
        return call
    # They are this task's alone, and would be divided by `machine_share` once more.
    count = int(threads) * call.config.machine_share
    return replace(call, config=replace(call.config, threads=count))


def _shared(call: GenerateCall, share: int) -> GenerateCall:
    """The call, for a worker that has one of so many equal shares of its machine."""
    if call.config.machine_share != 1:  # as the user says
        return call
    return replace(call, config=replace(call.config, machine_share=share))


def _renamed(batches: Batches, names: list[str]) -> Iterator[pa.RecordBatch]:
    return (_rename(batch, names) for batch in batches)


def _rename(batch: pa.RecordBatch, names: list[str]) -> pa.RecordBatch:
    return batch.rename_columns([*names, *batch.schema.names[len(names) :]])


def _partition_id() -> int:
    context = TaskContext.get()
    assert context is not None
    return int(context.partitionId())


def _num_tasks(session: SparkSession) -> int:
    """How many tasks the cluster runs side by side, as far as it is known by now."""
    context = session.sparkContext
    return max(context.defaultParallelism // int(context.getConf().get("spark.task.cpus", "1")), 1)


def _tasks_on_a_host(session: SparkSession, workers: int) -> int:
    """How many tasks run side by side on the host that has most executors."""
    context = session.sparkContext
    executors = context._jsc.sc().statusTracker().getExecutorInfos()
    hosts = Counter(executor.host() for executor in executors)
    if len(executors) < 2:
        return workers  # the driver alone, or a cluster that has not begun
    driver = context.getConf().get("spark.driver.host", "")
    if hosts[driver] > 0:
        hosts[driver] -= 1
    each = -(-workers // (len(executors) - 1))
    return max(hosts.values()) * each


def _labels(session: SparkSession, count: int) -> Ints:
    """For each of so many partitions an integer that Spark's hash partitioning brings to it.

    Spark has no public way to say to which partition a row goes but this in all its versions.
    """
    target = F.pmod(F.hash(F.col("id")), F.lit(count)).alias("target")
    rows = session.range(0, count * _TRIES, 1, 1).groupBy(target).agg(F.min("id").alias("id"))
    labels = np.full(count, -1, dtype=np.int64)
    for row in rows.collect():
        labels[row.target] = row.id
    assert (labels >= 0).all(), count
    return labels


def _arrow_schema(df: DataFrame) -> pa.Schema:
    try:
        return df.limit(0).toArrow().schema
    except PySparkException as error:
        raise UsageError(f"a column cannot be read by way of Arrow: {error}") from error


def _longs(*names: str) -> list[StructField]:
    return [StructField(name, LongType(), nullable=False) for name in names]
