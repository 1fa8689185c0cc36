"""A cluster in a loop: the passes and partitions that every engine runs, one after the other."""

from itertools import pairwise

import numpy as np
import pyarrow as pa

from batchllm.integrations.answer import PartitionRun
from batchllm.integrations.call import PLACE, ROW
from batchllm.integrations.passes import count_rows, place_rows, sample_rows
from batchllm.integrations.summary import Summary
from batchllm.integrations.survey import expected, sample_size, survey


def split(table, count):
    """A table as the record batches of so many input partitions."""
    edges = np.linspace(0, table.num_rows, count + 1).astype(int)
    return [
        table.slice(begin, end - begin).to_batches(max_chunksize=100)
        for begin, end in pairwise(edges)
    ]


def run(call, inputs, workers, holder, **options):
    """Answers in the table's order, and the summary."""
    schema = next(batch.schema for batches in inputs for batch in batches)
    names = list(call.spec.columns_of(schema))
    size = sample_size(len(inputs), workers, call.window_rows)
    samples = [sample_rows(batches, names, size, i) for i, batches in enumerate(inputs)]
    looked = survey(call, samples, workers, **options)
    ranges = looked.ranges
    partitions = looked.partitions([count_rows(b, ranges, i) for i, b in enumerate(inputs)])
    placed = pa.Table.from_batches(
        [batch for i, b in enumerate(inputs) for batch in place_rows(b, ranges, i)]
    )
    summary = Summary(expected=expected(partitions))
    answers = []
    of_row = partitions.of_range[placed[PLACE].to_numpy()]
    for number in range(partitions.count):
        mine = placed.filter(pa.array(of_row == number)).sort_by([(PLACE, "ascending")])
        task = PartitionRun(ranges.call, number, holder)
        answers += task.answer(mine.to_batches(max_chunksize=70))
        summary.add([task.report])
    whole = pa.Table.from_batches(answers, call.answered(schema)).sort_by(ROW)
    assert whole[ROW].to_pylist() == list(range(whole.num_rows))
    return whole.drop_columns([ROW]), summary
