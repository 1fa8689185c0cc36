"""The actors that answer on a Ray cluster."""

import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray

from batchllm.cpus import available_cpus
from batchllm.errors import WorkerError
from batchllm.integrations.answer import PartitionRun, answers_only
from batchllm.integrations.call import PLACE, ROW, GenerateCall
from batchllm.integrations.passes import by_place
from batchllm.integrations.ray_tasks import REPORT
from batchllm.integrations.summary import PartitionReport

PARTITION = "partition"
"""The column of the numbers that actors are handed."""
_TRIES = 5  # for a partition: what ends so many processes is no accident


class Attempts:
    """An actor of its own: how often each partition was begun."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def begin(self, partition: int) -> int:
        self._counts[partition] += 1
        return self._counts[partition]


class Answerer:
    """An actor of the pool: answers the partitions whose numbers it is handed, one at a time.

    Args:
        call: what is generated.
        added: the answer columns.
        partitions: their prompts, as `gather` made them.
        attempts: counts, so that a row that ends its process does not do so for ever.
    """

    def __init__(
        self,
        call: GenerateCall,
        added: pa.Schema,
        partitions: list["ray.ObjectRef[pa.Table]"],
        attempts: Any,  # noqa: ANN401  # a handle has no type
    ) -> None:
        if call.config.threads is None:  # Ray says one a process, whatever the machine has
            config = replace(call.config, threads=available_cpus().best)
            call = replace(call, config=config)
        self._call, self._added = call, added
        self._partitions, self._attempts = partitions, attempts

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for number in batch[PARTITION].to_pylist():
            if ray.get(self._attempts.begin.remote(number)) > _TRIES:
                raise WorkerError(
                    f"{_TRIES} worker processes ended while they answered partition {number}: by "
                    "a row that makes the engine crash, or for want of memory"
                )
            yield from self._answer(number)

    def _answer(self, number: int) -> Iterator[pa.Table]:
        """Answers, the report in the last row: so it is lost with them, or with neither."""
        rows = ray.get(self._partitions[number])
        task = PartitionRun(self._call, number)
        prompts = rows.drop_columns([ROW, PLACE]).to_batches()
        due = by_place(prompts, rows[ROW].to_numpy(), rows[PLACE].to_numpy())
        last = None
        for batch in task.answer(due):
            if last is not None:
                yield _with_report(last, None)
            last = answers_only(batch, self._added)
        if last is not None:
            yield _with_report(last, task.report)


def _with_report(batch: pa.RecordBatch, report: PartitionReport | None) -> pa.Table:
    reports: list[bytes | None] = [None] * batch.num_rows
    if report is not None:
        reports[-1] = pickle.dumps(report)
    return pa.Table.from_batches([batch]).append_column(REPORT, pa.array(reports, pa.binary()))
