"""What Spark's tasks do to their partitions' batches; all of it pickles."""

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark import Accumulator, AccumulatorParam, SparkFiles, TaskContext

from batchllm.integrations.answer import PartitionRun
from batchllm.integrations.call import PLACE, ROW, GenerateCall
from batchllm.integrations.passes import (
    Ranges,
    count_rows,
    place_rows,
    sample_rows,
    with_columns,
)
from batchllm.integrations.summary import Summary
from batchllm.prefix.partition import Ints

TO = "__batchllm_to"
"""The column of an integer that hashes to the partition a row goes to next."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"
Batches = Iterable[pa.RecordBatch]
Task = Callable[[Batches], Iterator[pa.RecordBatch]]


@dataclass(frozen=True, slots=True)
class Renamed:
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
    data = {"__batchllm_partition": [partition], "__batchllm_found": [pickle.dumps(found)]}
    return pa.record_batch(data)


@dataclass(frozen=True, slots=True)
class Sampling:
    """A look at some rows; `size` is how many at most."""

    size: int

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        number = _partition_id()
        batches = iter(batches)
        if (first := next(batches, None)) is not None:
            names = first.schema.names
            yield _found(number, sample_rows(chain([first], batches), names, self.size, number))


@dataclass(frozen=True, slots=True)
class Counting:
    """A count of what ranges have."""

    ranges: Ranges

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        number = _partition_id()
        yield _found(number, count_rows(batches, _here(self.ranges), number))


@dataclass(frozen=True, slots=True)
class Placing:
    """Rows get their numbers and places; `labels` [num_ranges] hash to the ranges' partitions."""

    ranges: Ranges
    labels: Ints

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        for batch in place_rows(batches, _here(self.ranges), _partition_id()):
            yield with_columns(batch, {TO: self.labels[batch.column(PLACE).to_numpy()]})


@dataclass(frozen=True, slots=True)
class Answering:
    """Rows get their answers; `first_row` is of the input's partitions, `labels` hash to them."""

    call: GenerateCall
    first_row: Ints
    labels: Ints
    reports: "Accumulator[Summary] | None"

    def __call__(self, batches: Batches) -> Iterator[pa.RecordBatch]:
        run = PartitionRun(_on_this_worker(self.call), _partition_id())
        for batch in run.answer(batches):
            home = np.searchsorted(self.first_row, batch.column(ROW).to_numpy(), "right") - 1
            yield with_columns(batch, {TO: self.labels[home]})
        if self.reports is not None:
            self.reports.add(Summary({run.partition: run.report}))


def answer_column(call: GenerateCall, columns: Iterator[pd.Series]) -> Iterator[pd.Series]:
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


class Reports(AccumulatorParam[Summary]):
    """Reports of tasks, taken in by partition: a task that ran twice counts once."""

    def zero(self, value: Summary) -> Summary:
        return Summary()

    def addInPlace(self, value1: Summary, value2: Summary) -> Summary:  # noqa: N802  # Spark's
        value1.add(value2.partitions.values())
        return value1


def _on_this_worker(call: GenerateCall) -> GenerateCall:
    """The call with the model, the GPUs and the threads that this task has."""
    call = with_shipped_model(call)
    context = TaskContext.get()
    if context is not None and (gpus := context.resources().get("gpu")) is not None:
        os.environ[_VISIBLE] = ",".join(gpus.addresses)  # before CUDA is first used here
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if call.config.threads is not None or not threads.isdecimal():
        return call
    # They are this task's alone, and would be divided by `machine_share` once more.
    count = int(threads) * call.config.machine_share
    return replace(call, config=replace(call.config, threads=count))


def with_shipped_model(call: GenerateCall) -> GenerateCall:
    """The call, with the path here of a model that was shipped (`--files`, `addFile`)."""
    name = call.model.name
    if name is None or Path(name).exists() or Path(name).is_absolute():
        return call
    shipped = Path(SparkFiles.get(name))
    return replace(call, model=replace(call.model, name=str(shipped))) if shipped.exists() else call


def _here(ranges: Ranges) -> Ranges:
    return replace(ranges, call=with_shipped_model(ranges.call))


def _renamed(batches: Batches, names: list[str]) -> Iterator[pa.RecordBatch]:
    return (_rename(batch, names) for batch in batches)


def _rename(batch: pa.RecordBatch, names: list[str]) -> pa.RecordBatch:
    return batch.rename_columns([*names, *batch.schema.names[len(names) :]])


def _partition_id() -> int:
    context = TaskContext.get()
    assert context is not None
    return int(context.partitionId())
