"""What columns hold, as one hash: the same however they are cut into batches and files."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class ContentHash:
    """Of a table's columns of numbers and text, taken in table by table.

    Each column is three streams of bytes (which values are null, how long texts are, the values),
    so that where one table ends and the next begins leaves no trace.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._streams = [[hashlib.sha256() for _ in range(3)] for _ in schema]

    def update(self, table: pa.Table) -> None:
        """Take in the next rows; `table` has the columns of the schema, perhaps among others."""
        for column, (nulls, lengths, values) in zip(self._schema, self._streams, strict=True):
            for chunk in table.column(column.name).chunks:
                nulls.update(pc.is_null(chunk).cast(pa.uint8()).to_numpy())
                if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
                    text = chunk.cast(pa.large_binary()).fill_null(b"")
                    sizes = pc.binary_length(text).to_numpy()
                    lengths.update(sizes)
                    values.update(_bytes_of(text, int(sizes.sum())))
                else:
                    values.update(chunk.fill_null(0).to_numpy())

    def hexdigest(self) -> str:
        whole = hashlib.sha256()
        for column, streams in zip(self._schema, self._streams, strict=True):
            whole.update(f"{column.name}:{column.type}\n".encode())
            for stream in streams:
                whole.update(stream.digest())
        return whole.hexdigest()


def _bytes_of(text: pa.Array, num_bytes: int) -> memoryview:
    """The values of a large_binary array without nulls, one behind the other."""
    _, offsets, data = text.buffers()
    if num_bytes == 0:
        return memoryview(b"")
    start = int(np.frombuffer(offsets, np.int64)[text.offset])
    return memoryview(data)[start : start + num_bytes]
