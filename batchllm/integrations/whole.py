"""A table in the memory of one process, answered there: for libraries that have no workers.

One partition, but in windows all the same where it is large, and then in the order of its prompts:
windows of rows as they come would each compute what they share.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pyarrow as pa

from batchllm.integrations.answer import WINDOW_BYTES, PartitionRun, answers_only
from batchllm.integrations.call import PLACE, ROW, GenerateCall
from batchllm.integrations.held import HOLDER, ModelHolder
from batchllm.integrations.passes import by_place, place_rows, sample_rows, with_columns
from batchllm.integrations.summary import Summary
from batchllm.integrations.survey import sample_size, survey
from batchllm.text.field_order import learn_field_order

_BATCH_ROWS = 65_536


def answer_table(
    table: pa.Table,
    call: GenerateCall,
    summary: Summary | None = None,
    holder: ModelHolder = HOLDER,
) -> pa.Table:
    """The columns that answers add to a table, one row for each of its rows, in their order.

    The table's own columns are the caller's to put beside them, untouched.

    Args:
        table: with the columns that prompts are made of, and all those it is to have afterwards.
        call: what is generated.
        summary: is told what it took, after forgetting the call before.
        holder: of this process's model.

    Raises:
        BatchLLMError: the call does not fit the table, or the model cannot be loaded or run.
    """
    added = call.check(table.schema).schema
    prompts = table.select(list(call.spec.columns_of(table.schema)))
    is_one_window = prompts.num_rows <= call.window_rows and prompts.nbytes <= WINDOW_BYTES
    if is_one_window or not prompts.num_columns:
        rules = learn_field_order(call.spec, [prompts], prompts.num_rows)
        call, batches = replace(call, field_rules=rules), _as_they_come(prompts)
    else:
        call, batches = _in_prompt_order(prompts, call)
    task = PartitionRun(call, 0, holder)
    answers = [answers_only(batch, added) for batch in task.answer(batches)]
    if summary is not None:
        summary.clear()
        summary.add([task.report])
    row = pa.field(ROW, pa.int64(), nullable=False)
    whole = pa.Table.from_batches(answers, pa.schema([row, *added]))
    return whole.sort_by(ROW).drop_columns([ROW])


def _as_they_come(table: pa.Table) -> Iterable[pa.RecordBatch]:
    row = 0
    for batch in table.to_batches():
        yield with_columns(batch, {ROW: row + np.arange(batch.num_rows)})
        row += batch.num_rows


def _in_prompt_order(
    table: pa.Table, call: GenerateCall
) -> tuple[GenerateCall, Iterable[pa.RecordBatch]]:
    """The table's rows by their places; and the call with the order of its fields."""
    batches = table.to_batches(max_chunksize=_BATCH_ROWS)
    size = sample_size(1, 1, call.window_rows)
    ranges = survey(call, [sample_rows(batches, table.column_names, size, 0)], 1).ranges
    placed = place_rows(batches, ranges, 0)
    places = np.concatenate([batch[PLACE] for batch in placed])
    return ranges.call, by_place(batches, np.arange(len(places)), places)
