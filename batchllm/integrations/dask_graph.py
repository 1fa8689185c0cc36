"""A call of `generate` as a graph of Dask tasks.

    input partition → its rows placed → a piece for each partition of answers → answered
      → a piece for each input partition → its rows in order, beside the input partition

Pieces are tasks of their own, not Dask's peer-to-peer shuffle: if a worker is lost, that begins
anew and throws away the answers it had passed on. Here only what the lost worker held is computed
again. What prompts need is read for itself, so the other columns are not kept while the model runs.
A partition that is read again may come in another order, as Dask's shuffles and merges may, so an
answer travels with a print of what it is the answer to, and is held against the row it is put by.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from dask._task_spec import DataNode, List, Task, TaskRef

from batchllm.errors import InputError
from batchllm.integrations.answer import PartitionRun
from batchllm.integrations.call import PLACE, ROW, GenerateCall
from batchllm.integrations.dask_cluster import send_report
from batchllm.integrations.dask_rows import Rows, prints, with_schema
from batchllm.integrations.passes import Ranges, Sample, count_rows, place_rows, sample_rows
from batchllm.prefix.partition import Ints
from batchllm.prefix.tally import Tally

_BATCH_ROWS = 16_384
_PRINT = "__batchllm_print"  # the column of prints, beside ROW
_CHANGED = (
    "the table's rows, or their order, are not the same each time that it is computed, so answers "
    "cannot be put beside them; persist() it first, or write it to files"
)
Key = Any  # Dask's: a text, or a tuple that begins with one
Graph = dict[Key, Any]


@dataclass(frozen=True, slots=True)
class Parts:
    """A collection's partitions, not computed: the keys of a graph.

    `prompts` are what prompts are made of at least, `whole` all there is. `names` are all columns,
    None where only the rows tell.
    """

    rows: Rows
    names: list[str] | None
    graph: Graph
    prompts: list[Key]
    whole: list[Key]


@dataclass(frozen=True, slots=True)
class Looked:
    """What pass one finds in a partition: rows, their types, and the names of all its columns."""

    sample: Sample
    schema: pa.Schema
    names: list[str]


@dataclass(frozen=True, slots=True)
class Plan:
    """What all tasks of a call are told; it travels once.

    Attributes:
        rows: how partitions are read.
        schema: of what prompts are made of.
        ranges: the fine ranges.
        of_range: the partition of answers of each fine range, [num_ranges].
        answers: the columns that answers add.
        topic: where reports go.
    """

    rows: Rows
    schema: pa.Schema
    ranges: Ranges
    of_range: Ints
    answers: pa.Schema
    topic: str


def sample_tasks(parts: Parts, call: GenerateCall, size: int, name: str) -> dict[Key, Task]:
    """Pass one, a task for each partition."""
    return {
        (name, i): Task((name, i), _look, TaskRef(key), parts.rows, call, size, i)
        for i, key in enumerate(parts.prompts)
    }


def count_tasks(parts: Parts, schema: pa.Schema, ranges: Ranges, name: str) -> dict[Key, Task]:
    """Pass two."""
    return {
        (name, i): Task((name, i), _count, TaskRef(key), parts.rows, schema, ranges, i)
        for i, key in enumerate(parts.prompts)
    }


def answer_graph(
    parts: Parts, plan: Plan, tallies: Sequence[Tally], token: str
) -> tuple[Graph, list[Key]]:
    """Everything behind the passes, and the keys of the answered partitions."""
    names = {step: f"batchllm-{step}-{token}" for step in ("place", "piece", "back", "join")}
    answered, whole = answer_name(token), f"batchllm-plan-{token}"
    graph: Graph = dict(parts.graph)
    graph[whole] = DataNode(whole, plan)
    num_parts = int(plan.of_range.max(initial=-1)) + 1
    rows = np.array([np.bincount(plan.of_range, t.rows, num_parts) for t in tallies], dtype=int)

    def add(key: Key, function: Callable[..., Any], *arguments: object) -> None:
        graph[key] = Task(key, function, *arguments)

    def refs(step: str, pairs: list[tuple[int, int]]) -> List:
        return List(*(TaskRef((names[step], i, j)) for i, j in pairs))

    for i, key in enumerate(parts.prompts):
        add((names["place"], i), _place, TaskRef(whole), TaskRef(key), i)
    for i, j in np.argwhere(rows).tolist():  # no task for a pair that shares no rows
        add((names["piece"], i, j), _take, TaskRef((names["place"], i)), j)
        # The plan is named so that no optimization makes one task of this and the answers, which
        # the scheduler is to find by their key.
        add((names["back"], i, j), _take_back, TaskRef((answered, j)), i, TaskRef(whole))
    for j in range(num_parts):
        pairs = [(int(i), j) for i in np.flatnonzero(rows[:, j])]
        add((answered, j), _answer, TaskRef(whole), refs("piece", pairs), j)
    for i, key in enumerate(parts.whole):
        pairs = [(i, int(j)) for j in np.flatnonzero(rows[i])] if num_parts else []
        add((names["join"], i), _join, TaskRef(whole), TaskRef(key), refs("back", pairs), i)
    return graph, [(names["join"], i) for i in range(len(parts.whole))]


def answer_name(token: str) -> str:
    """The first part of the keys of the tasks that run the model."""
    return f"batchllm-answer-{token}"


def _look(part: Any, rows: Rows, call: GenerateCall, size: int, number: int) -> Looked:  # noqa: ANN401
    names = rows.names(part)
    wanted = call.spec.columns_of(pa.schema([(name, pa.null()) for name in names]))
    table = rows.table(part, list(wanted))
    sample = sample_rows(table.to_batches(_BATCH_ROWS), table.column_names, size, number)
    return Looked(sample, table.schema, names)


def _count(part: Any, rows: Rows, schema: pa.Schema, ranges: Ranges, number: int) -> Tally:  # noqa: ANN401
    return count_rows(_batches(part, rows, schema), ranges, number)


def _place(plan: Plan, part: Any, number: int) -> dict[int, pa.Table]:  # noqa: ANN401
    """A partition's rows by the partition of answers that each goes to."""
    batches = _batches(part, plan.rows, plan.schema)
    placed = list(place_rows(batches, plan.ranges, number))
    if not placed:
        return {}
    table = pa.Table.from_batches(placed)
    table = table.append_column(_PRINT, [prints(pa.Table.from_batches(batches))])
    return _split(table, plan.of_range[table[PLACE].to_numpy()])


def _take(pieces: dict[int, pa.Table], number: int) -> pa.Table:
    if number not in pieces:
        raise InputError(_CHANGED)
    return pieces[number]


def _take_back(pieces: dict[int, pa.Table], number: int, _: Plan) -> pa.Table:
    return _take(pieces, number)


def _answer(plan: Plan, pieces: list[pa.Table], number: int) -> dict[int, pa.Table]:
    """Answers, with their rows' numbers, by input partition."""
    table = pa.concat_tables(pieces).sort_by(ROW)
    numbers, marks = table[ROW].to_numpy(), table[_PRINT].to_numpy()
    table = table.drop_columns([_PRINT]).sort_by([(PLACE, "ascending"), (ROW, "ascending")])
    run = PartitionRun(plan.ranges.call, number)
    answered = pa.Table.from_batches(run.answer(table.to_batches(_BATCH_ROWS)))
    send_report(plan.topic, run.report)
    added = plan.answers.names
    names = answered.column_names[-1 - len(added) :]  # ROW is the last
    answers = answered.select(names).rename_columns([*added, ROW])
    rows = answers[ROW].to_numpy()
    answers = answers.append_column(_PRINT, [marks[np.searchsorted(numbers, rows)]])
    return _split(answers, np.searchsorted(plan.ranges.first_row, rows, "right") - 1)


def _join(plan: Plan, part: Any, pieces: list[pa.Table], number: int) -> Any:  # noqa: ANN401
    """An input partition's rows with their answers beside them."""
    first, end = (int(row) for row in plan.ranges.first_row[number : number + 2])
    ours = [pa.field(ROW, pa.int64()), pa.field(_PRINT, pa.uint64())]
    none = pa.schema([*plan.answers, *ours]).empty_table()
    answers = pa.concat_tables(pieces).sort_by(ROW) if pieces else none
    asked = pa.Table.from_batches(_batches(part, plan.rows, plan.schema), plan.schema)
    if not (
        np.array_equal(answers[ROW].to_numpy(), np.arange(first, end))
        and np.array_equal(answers[_PRINT].to_numpy(), prints(asked))
    ):
        raise InputError(_CHANGED)
    return plan.rows.join(part, answers.drop_columns([ROW, _PRINT]))


def _batches(part: Any, rows: Rows, schema: pa.Schema) -> list[pa.RecordBatch]:  # noqa: ANN401
    batches: list[pa.RecordBatch] = with_schema(rows.table(part, schema.names), schema).to_batches(
        _BATCH_ROWS
    )
    return batches


def _split(table: pa.Table, places: Ints) -> dict[int, pa.Table]:
    """Rows by their place; copies, since a slice would send what it is cut from along."""
    order = np.argsort(places, kind="stable")
    found, starts = np.unique(places[order], return_index=True)
    ends = [*starts[1:].tolist(), len(order)]
    return {
        int(place): table.take(pa.array(order[begin:end]))
        for place, begin, end in zip(found, starts.tolist(), ends, strict=True)
    }
