"""Arrow columns read as prompts: which types will do, and rows' values without per-token Python."""

import difflib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchllm.errors import UsageError, one_line
from batchllm.request import RaggedTokens, RowError
from batchllm.text.ragged import rows_with

RowErrors = dict[int, RowError]


def check_column(
    schema: pa.Schema, name: str, *, role: str, accepts: Callable[[pa.DataType], bool], wants: str
) -> None:
    """Hold one column against what is wanted of it.

    Args:
        schema: the input's.
        name: the column.
        role: the option that names it, for the message.
        accepts: whether a type will do; a dictionary's is that of its values.
        wants: the same in words.

    Raises:
        UsageError: no such column (names the nearest), two of them, or another type.
    """
    found = schema.names.count(name)
    if found == 0:
        near = difflib.get_close_matches(name, schema.names, 1)
        names = f"did you mean {near[0]!r}?" if near else f"columns: {_listed(schema.names)}"
        raise UsageError(f"{role} {name!r} is not a column of the input; {names}")
    if found > 1:
        raise UsageError(f"{role} {name!r} names {found} columns of the input; rename one")
    kind = schema.field(name).type
    if not accepts(kind.value_type if pa.types.is_dictionary(kind) else kind):
        raise UsageError(f"{role} {name!r} has type {kind}; it must be {wants}")


def is_text(kind: pa.DataType) -> bool:
    """Strings of any layout."""
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def is_integer(kind: pa.DataType) -> bool:
    """Whole numbers of any width."""
    return bool(pa.types.is_integer(kind))


def is_list_of_integers(kind: pa.DataType) -> bool:
    """Lists of any layout of whole numbers of any width."""
    return _is_list(kind) and is_integer(kind.value_type)


def is_messages(kind: pa.DataType) -> bool:
    """JSON text, or a list of structs with `role` and `content`."""
    if is_text(kind):
        return True
    if not (_is_list(kind) and pa.types.is_struct(kind.value_type)):
        return False
    fields = {field.name for field in kind.value_type.fields}
    return {"role", "content"} <= fields


def python_values(column: pa.ChunkedArray, errors: RowErrors) -> list[Any]:
    """A column as Python values.

    A row whose value has none, such as text that is not UTF-8, becomes None and an error. Times
    that Python's are too coarse or too short for become text.
    """
    # Of nanoseconds Arrow makes pandas' types, but only where pandas is installed.
    kind = _of_microseconds(column.type)
    try:
        if kind != column.type:
            column = column.cast(kind)
        return column.to_pylist()  # type: ignore[no-any-return]
    except Exception:  # one value is enough, by what it is: find it
        return [_python_value(value, kind, row, errors) for row, value in enumerate(column)]


def _of_microseconds(kind: pa.DataType) -> pa.DataType:
    """The type with microseconds wherever it has nanoseconds."""
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if pa.types.is_time64(kind):
        return pa.time64("us")
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_of_microseconds(f.type)) for f in kind.fields])
    if pa.types.is_map(kind):
        return pa.map_(
            _of_microseconds(kind.key_type), _of_microseconds(kind.item_type), kind.keys_sorted
        )
    if pa.types.is_dictionary(kind):
        value = _of_microseconds(kind.value_type)
        return kind if value == kind.value_type else value
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_field_of_microseconds(kind), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(_field_of_microseconds(kind))
    return pa.list_(_field_of_microseconds(kind)) if pa.types.is_list(kind) else kind


def _field_of_microseconds(kind: pa.DataType) -> pa.Field:
    return kind.value_field.with_type(_of_microseconds(kind.value_type))


def _python_value(value: pa.Scalar, kind: pa.DataType, row: int, errors: RowErrors) -> Any:  # noqa: ANN401
    try:
        return (value if kind == value.type else value.cast(kind)).as_py()
    except UnicodeDecodeError:
        errors.setdefault(row, RowError("invalid_utf8", "the text is not valid UTF-8"))
    except Exception as error:
        if pa.types.is_temporal(value.type):
            with suppress(pa.ArrowException, UnicodeDecodeError):
                return value.cast(pa.string()).as_py()
        message = f"a value of type {value.type} cannot be read: {error}"
        errors.setdefault(row, RowError("invalid_value", one_line(message, 300)))
    return None


def token_rows(column: pa.ChunkedArray, vocab_size: int, errors: RowErrors) -> RaggedTokens:
    """A column of token-id lists, straight from its buffers.

    Rows that are null, hold a null, or an id outside [0, vocab_size) get an error.
    """
    array = _one_array(column)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = np.zeros(len(array) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    flat = pc.list_flatten(array)  # skips null rows, and respects slices
    for row in np.flatnonzero(pc.is_null(array).to_numpy(zero_copy_only=False)).tolist():
        errors.setdefault(row, RowError("null_prompt", "the token ids are null"))
    for row in rows_with(pc.is_null(flat).to_numpy(zero_copy_only=False), offsets):
        errors.setdefault(row, RowError("invalid_token_ids", "a token id is null"))
    values = pc.fill_null(flat, 0).to_numpy(zero_copy_only=False)
    outside = (values < 0) | (values >= vocab_size)
    for row in rows_with(outside, offsets):
        span = slice(offsets[row], offsets[row + 1])
        bad = values[span][outside[span]][0]
        errors.setdefault(row, outside_vocabulary(int(bad), vocab_size))
    # Values that int32 cannot hold wrap around, in rows that the caller empties.
    return RaggedTokens(values.astype(np.int32), offsets)


def outside_vocabulary(token_id: int, vocab_size: int) -> RowError:
    """The error of a row that has this id."""
    message = f"token id {token_id} is outside the vocabulary of {vocab_size:,}"
    return RowError("invalid_token_ids", message)


def max_tokens_rows(column: pa.ChunkedArray, errors: RowErrors) -> NDArray[np.int32]:
    """A column of output limits, int32 [num_rows]; 0 where the row is null and so has none.

    Values below 1 or above int32 get an error.
    """
    array = _one_array(column)
    null = pc.is_null(array).to_numpy(zero_copy_only=False)
    values = pc.fill_null(array, 1).to_numpy(zero_copy_only=False)
    bad = (values < 1) | (values > np.iinfo(np.int32).max)
    for row in np.flatnonzero(bad).tolist():
        message = f"max_tokens is {values[row]}; it must be at least 1 and at most 2147483647"
        errors.setdefault(row, RowError("invalid_max_tokens", message))
    return np.where(null | bad, 0, values).astype(np.int32)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # older versions, for some types
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:10])
    return f"{shown}, … ({len(names)} in all)" if len(names) > 10 else shown
