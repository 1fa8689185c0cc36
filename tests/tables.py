"""Tables as sources of rows, without files."""

import numpy as np
import pyarrow as pa

from batchllm.io.rows import Rows


class InMemory:
    """A table as a source of rows, a few at a time."""

    def __init__(self, table, batch_rows=3):
        self.table = table
        self.schema = table.schema
        self.num_rows = table.num_rows
        self._batch_rows = batch_rows

    def read(self, wanted=None, columns=None):
        wanted = np.ones(self.num_rows, dtype=np.bool_) if wanted is None else wanted
        table = self.table if columns is None else self.table.select(list(columns))
        for start in range(0, self.num_rows, self._batch_rows):
            index = np.arange(start, min(start + self._batch_rows, self.num_rows, len(wanted)))
            index = index[wanted[index]]
            if len(index):
                yield Rows(index, table.take(pa.array(index)))
