"""Columns as fields: which rows print the same value, and how long it is."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchllm.prefix.fields import Field, Ints
from batchllm.text.columns import is_integer, is_text, python_values

_PUNCTUATION = len(": , ")


def printed_values(column: pa.ChunkedArray) -> pa.Array:
    """A column's values as text, equal where they print alike; large strings, without nulls."""
    if pa.types.is_dictionary(column.type) and _is_decoded(column.type.value_type):
        column = pc.cast(column, column.type.value_type)
    if is_text(column.type) or is_integer(column.type):
        texts = pc.cast(column, pa.large_string())
    else:
        values = [str(value) for value in python_values(column, {})]
        texts = pa.chunked_array([pa.array(values, pa.large_string())])
    texts = pc.fill_null(texts, "null")
    return pa.concat_arrays([*texts.chunks, pa.array([], pa.large_string())])


def as_field(name: str, values: pa.Array) -> Field:
    """A field of printed values alone, without its name."""
    codes = pc.dictionary_encode(values).indices
    return Field(name, _integers(codes), _integers(pc.utf8_length(values)))


def as_json_field(name: str, values: pa.Array, kind: pa.DataType) -> Field:
    """A field as an object in JSON prints it, `"name": "value", `; `kind` is its column's type."""
    field = as_field(name, values)
    around = len(json.dumps(name)) + _PUNCTUATION + (2 if is_text(kind) else 0)
    return Field(name, field.codes, field.lengths + around)


def _is_decoded(kind: pa.DataType) -> bool:
    """Whether Arrow can make such values of a dictionary; it cannot of views."""
    plain = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return plain or is_integer(kind)


def _integers(array: pa.Array) -> Ints:
    numbers: Ints = array.to_numpy(zero_copy_only=False).astype(np.int64)
    return numbers
