"""One schema for many files: what the columns of a data set are, and how each batch gets there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from batchllm.errors import InputError


def hive_type(values: Iterable[str | None]) -> pa.DataType:
    """The type pyarrow infers for a partition key: int32 when every value is one, else string."""
    column = pa.array(list(values), pa.string())
    if column.null_count == len(column):
        return pa.string()
    try:
        column.cast(pa.int32())
    except pa.ArrowInvalid:
        return pa.string()
    return pa.int32()


@dataclass(slots=True)
class SchemaUnifier:
    """Collects the files' schemas into one that all of them can be cast to without loss.

    Columns keep the order in which they first appear; the first file gives the metadata. A column
    that some file lacks becomes nullable. Types widen as Arrow's permissive promotion has it, and
    dictionary and extension columns fall back to their plain type where files disagree.
    """

    _fields: dict[str, pa.Field] = field(default_factory=dict)
    _origin: dict[str, str] = field(default_factory=dict)
    _num_seen: dict[str, int] = field(default_factory=dict)
    _num_schemas: int = 0
    _metadata: Mapping[bytes, bytes] | None = None

    def add(self, name: str, schema: pa.Schema) -> None:
        """Take in the schema of the file called `name` in messages.

        Raises:
            InputError: the file has two columns of one name, or a column's type cannot be joined
                with an earlier file's.
        """
        if self._num_schemas == 0:
            self._metadata = schema.metadata
        self._num_schemas += 1
        if len(set(schema.names)) < len(schema.names):
            twice = next(n for n in schema.names if schema.names.count(n) > 1)
            raise InputError(f"{name}: column {twice!r} appears more than once")
        for new in schema:
            self._num_seen[new.name] = self._num_seen.get(new.name, 0) + 1
            known = self._fields.get(new.name)
            if known is None:
                self._fields[new.name], self._origin[new.name] = new, name
            elif not known.equals(new):
                self._fields[new.name] = self._join(known, new, name)

    def add_hive(self, values: Sequence[Mapping[str, str | None]]) -> None:
        """Take in the partition keys of every file's path, as columns after the files' own.

        Raises:
            InputError: a key's type cannot be joined with the column that only some files have.
        """
        for key in dict.fromkeys(key for file in values for key in file):
            known = self._fields.get(key)
            if known is not None and self._num_seen[key] == self._num_schemas:
                continue  # every file has the column itself
            new = pa.field(key, hive_type(file.get(key) for file in values))
            self._fields[key] = self._join(known, new, "the directory names") if known else new
            self._num_seen.setdefault(key, 0)

    def schema(self) -> pa.Schema:
        """The schema so far, with the first file's metadata."""
        return pa.schema(
            [
                column.with_nullable(True)
                if self._num_seen[column.name] < self._num_schemas
                else column
                for column in self._fields.values()
            ],
            metadata=self._metadata,
        )

    def _join(self, known: pa.Field, new: pa.Field, name: str) -> pa.Field:
        for left, right in ((known, new), (_plain(known), _plain(new))):
            try:
                joined = pa.unify_schemas(
                    [pa.schema([left]), pa.schema([right])], promote_options="permissive"
                )
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                continue
            return joined.field(0)
        raise InputError(
            f"column {new.name!r} is {known.type} in {self._origin[new.name]}"
            f" but {new.type} in {name}; the files' schemas are incompatible"
        )


def _plain(column: pa.Field) -> pa.Field:
    plain = column.type
    if isinstance(plain, pa.BaseExtensionType):
        plain = plain.storage_type
    if pa.types.is_dictionary(plain):
        plain = plain.value_type
    if pa.types.is_string_view(plain):
        plain = pa.large_string()
    return column.with_type(plain)


def conform(
    batch: pa.RecordBatch, schema: pa.Schema, constants: Mapping[str, str | None]
) -> pa.RecordBatch:
    """Give `batch` exactly `schema`: cast where types differ, constants and nulls where it lacks.

    `constants` are hive values as text; a column of the file itself comes before one.

    Raises:
        pa.ArrowInvalid: a value does not survive the cast.
    """
    present = {name: i for i, name in enumerate(batch.schema.names)}
    columns = []
    for column in schema:
        if column.name in present:
            array = _cast(batch.column(present[column.name]), column.type)
        else:
            text = pa.scalar(constants.get(column.name), pa.string())
            array = _cast(pa.repeat(text, batch.num_rows), column.type)
        columns.append(array)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _cast(array: pa.Array, target: pa.DataType) -> pa.Array:
    if array.type.equals(target):
        return array
    if array.null_count == len(array):
        return pa.nulls(len(array), target)  # Arrow cannot cast null to every nested type
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    if pa.types.is_dictionary(target) and not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    return array.cast(target)
