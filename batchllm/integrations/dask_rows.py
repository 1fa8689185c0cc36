"""What Dask's collections are made of, as Arrow tables of what prompts need, and back with answers.

Only the columns that prompts are made of become Arrow. The others stay what they are, so a user's
dtypes and index leave as they came.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from batchllm.errors import InputError

PROMPT = "prompt"
"""What a text of a bag is called as a column."""


class Rows(Protocol):
    """A kind of partition."""

    def names(self, part: Any) -> list[str]:  # noqa: ANN401  # Dask's partitions have any type
        """Its columns."""

    def table(self, part: Any, names: list[str]) -> pa.Table:  # noqa: ANN401
        """Some of its columns; one that it lacks is null."""

    def join(self, part: Any, answers: pa.Table) -> Any:  # noqa: ANN401
        """The same rows with answers beside them."""


class FrameRows:
    """Partitions of a data frame: pandas frames."""

    def names(self, part: pd.DataFrame) -> list[str]:
        return [str(name) for name in part.columns]

    def table(self, part: pd.DataFrame, names: list[str]) -> pa.Table:
        frame = part[names].reset_index(drop=True)
        for name in names:  # partitions have other categories, or number them otherwise
            if isinstance(frame[name].dtype, pd.CategoricalDtype):
                frame[name] = frame[name].astype(frame[name].dtype.categories.dtype)
        return _table(frame, names)

    def join(self, part: pd.DataFrame, answers: pa.Table) -> pd.DataFrame:
        added = pandas_answers(answers)
        added.index = part.index
        return pd.concat([part, added], axis=1)


class BagRows:
    """Partitions of a bag: lists of dicts, or of texts, which become dicts."""

    def names(self, part: list[Any]) -> list[str]:
        return list(dict.fromkeys(name for row in part for name in _as_dict(row)))

    def table(self, part: list[Any], names: list[str]) -> pa.Table:
        rows = [_as_dict(row) for row in part]
        try:
            arrays = [pa.array([row.get(name) for row in rows]) for name in names]
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise _mixed(names, error) from error
        return pa.Table.from_arrays(arrays, names=names)

    def join(self, part: list[Any], answers: pa.Table) -> list[dict[str, Any]]:
        added = answers.to_pylist()
        return [_as_dict(row) | answer for row, answer in zip(part, added, strict=True)]


def pandas_answers(answers: pa.Table) -> pd.DataFrame:
    """Answer columns in pandas' types that have nulls."""
    types = {pa.int32(): pd.Int32Dtype(), pa.string(): pd.StringDtype("pyarrow")}
    frame: pd.DataFrame = answers.to_pandas(types_mapper=types.get)
    return frame


def common_schema(schemas: Iterable[pa.Schema], no_type: dict[str, pa.DataType]) -> pa.Schema:
    """One for all partitions; `no_type` are for columns in which no partition has a value.

    Raises:
        InputError: there is none.
    """
    try:
        schema = pa.unify_schemas(list(schemas), promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"partitions have different types for a column: {error}") from error
    fields = [
        field.with_type(no_type.get(field.name, pa.string()))
        if pa.types.is_null(field.type)
        else field
        for field in schema
    ]
    return pa.schema(fields)


def with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A partition's table with the types of all.

    Raises:
        InputError: it has other columns or values than it had when types were chosen.
    """
    try:
        return table.cast(schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
        raise InputError(f"a partition's columns are not what they were: {error}") from error


def prints(table: pa.Table) -> NDArray[np.uint64]:
    """A number for each row that says what is in it, the same in every process."""
    found = np.zeros(table.num_rows, dtype=np.uint64)
    for column in table.columns:
        if pa.types.is_nested(column.type):
            values = np.array([repr(value) for value in column.to_pylist()], dtype=object)
        else:
            values = column.to_numpy()
        found = found * np.uint64(31) + pd.util.hash_array(values)
    return found


def _table(frame: pd.DataFrame, names: list[str]) -> pa.Table:
    try:
        table = pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise _mixed(names, error) from error
    return table.replace_schema_metadata(None)


def _mixed(names: list[str], error: Exception) -> InputError:
    return InputError(f"columns {', '.join(names)} have values of several types: {error}")


def _as_dict(row: Any) -> dict[str, Any]:  # noqa: ANN401
    if isinstance(row, str):
        return {PROMPT: row}
    if not isinstance(row, dict):
        raise InputError(f"a bag's items must be texts or dicts; one is a {type(row).__name__}")
    return row
