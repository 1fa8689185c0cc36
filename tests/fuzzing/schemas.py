"""Columns of random types, nested at will, under every prompt spec."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from builders import tiny_tokenizer

from batchllm.io.parquet import ParquetInput
from batchllm.text.field_order import learn_field_order
from batchllm.text.prompts import PromptBuilder, PromptSpec
from fuzzing.mutate import TEXTS
from fuzzing.texts import check_rows

_ROWS = 5
_LEAVES = [
    *(pa.null(), pa.bool_(), pa.int8(), pa.uint64(), pa.int64(), pa.float16(), pa.float64()),
    *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.binary(3)),
    *(pa.binary_view(), pa.large_binary(), pa.date32(), pa.date64(), pa.time32("s")),
    *(pa.time64("ns"), pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.timestamp("s", "+01:00")),
    *(pa.timestamp("ms", "No/Where"), pa.duration("ns"), pa.month_day_nano_interval()),
    *(pa.decimal128(38, 3), pa.decimal256(70, 0), pa.decimal32(5, 2), pa.uuid(), pa.int32()),
    *(pa.string(), pa.string(), pa.int32()),
]
_NAMES = ["p", "q", "row", "p.q", "a\nb", "items", "", "é", "P", "answer", "role", "content", "__x"]


def random_type(rng, depth):
    if depth <= 0 or rng.random() < 0.4:
        return rng.choice(_LEAVES)
    inner = random_type(rng, depth - 1)
    match rng.randrange(9):
        case 0:
            return pa.list_(inner)
        case 1:
            return pa.large_list(inner)
        case 2:
            return pa.list_(inner, rng.choice([0, 1, 3]))
        case 3:
            return pa.list_view(inner)
        case 4:
            names = rng.sample(_NAMES, k=rng.randint(0, 3))
            return pa.struct([(name, random_type(rng, depth - 1)) for name in names])
        case 5:
            return pa.map_(rng.choice([pa.string(), pa.int32()]), inner)
        case 6:
            return pa.dictionary(rng.choice([pa.int8(), pa.int32()]), rng.choice(_LEAVES))
        case 7:
            return pa.run_end_encoded(pa.int32(), inner)
        case _:
            messages = [("role", pa.string()), ("content", rng.choice([pa.string(), inner]))]
            return pa.list_(pa.struct(messages))


def random_array(rng, kind):
    """Values of a type, or nulls where there is no way to make some."""
    try:
        return _values(rng, kind, _ROWS)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, NotImplementedError):
        return pa.array([None] * _ROWS)


def _values(rng, kind, count):
    types = pa.types
    if types.is_struct(kind):
        parts = [_values(rng, field.type, count) for field in kind.fields]
        if not parts:
            return pa.nulls(count, kind)
        return pa.StructArray.from_arrays(parts, fields=list(kind.fields))
    if types.is_list(kind) or types.is_large_list(kind):
        offsets = sorted(rng.randrange(4) for _ in range(count + 1))
        maker = pa.ListArray if types.is_list(kind) else pa.LargeListArray
        mask = pa.array([rng.random() < 0.2 for _ in range(count)])
        values = _values(rng, kind.value_type, 4)
        return maker.from_arrays(offsets, values, type=kind, mask=mask)
    if types.is_dictionary(kind):
        values = _values(rng, kind.value_type, 3)
        index = pa.array([rng.choice([0, 1, 2, None]) for _ in range(count)], kind.index_type)
        return pa.DictionaryArray.from_arrays(index, values)
    if types.is_run_end_encoded(kind):
        return pa.RunEndEncodedArray.from_arrays(
            pa.array([2, count], pa.int32()), _values(rng, kind.value_type, 2)
        )
    if types.is_integer(kind):
        return pa.array([rng.choice([0, 1, 3, 120, None]) for _ in range(count)], kind)
    if types.is_string(kind) and rng.random() < 0.2:
        return pa.array([rng.choice([b"a", b"\xff", None]) for _ in range(count)]).view(kind)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        texts = [text.encode("utf-8", "replace").decode() for text in TEXTS]
        return pa.array([rng.choice([*texts, None]) for _ in range(count)], kind)
    if types.is_timestamp(kind) or types.is_duration(kind) or types.is_date64(kind):
        numbers = [rng.choice([0, -1, 2**62, -(2**62), None]) for _ in range(count)]
        return pa.array(numbers, pa.int64()).view(kind)
    if types.is_decimal(kind):
        return pa.array([rng.choice([1, None, 10]) for _ in range(count)], pa.int32()).cast(kind)
    if types.is_floating(kind):
        numbers = [rng.choice([0.5, np.nan, np.inf, None]) for _ in range(count)]
        return pa.array(numbers, pa.float64()).cast(kind)
    if types.is_fixed_size_binary(kind):
        return pa.array([rng.choice([b"abc", None]) for _ in range(count)], kind)
    return pa.nulls(count, kind)


class Schemas:
    """Tables in memory, and those that Parquet can hold also from a file."""

    def __init__(self, scratch):
        self._path = scratch / "a.parquet"
        self._tokenizer = tiny_tokenizer()

    def run(self, rng: random.Random):
        names = rng.sample(_NAMES, k=rng.randint(1, 5)) if rng.random() < 0.95 else ["p", "p"]
        depth = rng.choice([0, 1, 1, 2, 3, 5])
        kinds = [random_type(rng, depth) for _ in names]
        if rng.random() < 0.03:
            for _ in range(rng.choice([100, 400])):
                kinds[0] = rng.choice([pa.list_(kinds[0]), pa.struct([("a", kinds[0])])])
        arrays = [random_array(rng, kind) for kind in kinds]
        schema = pa.schema(list(zip(names, [array.type for array in arrays], strict=True)))
        try:
            table = pa.table(arrays, schema=schema)
            table.validate(full=True)
        except pa.ArrowException:
            return  # a table that nobody can make otherwise
        spec = self._spec(rng, names)
        if rng.random() < 0.5 and self._written(table):
            source = ParquetInput(self._path)
            spec.check(source.schema)
            builder = PromptBuilder(spec, self._tokenizer, 300)
            tables = [rows.table for rows in source.read(columns=builder.columns_of(source.schema))]
            table = pa.concat_tables(tables)
        spec.check(table.schema)
        rules = learn_field_order(spec, [table], table.num_rows)
        builder = PromptBuilder(spec, self._tokenizer, 300, field_rules=rules)
        check_rows(builder.build(table))
        builder.keys(table)

    def _spec(self, rng, names):
        name = rng.choice([*names, names[0], "p"])
        limit = rng.choice([None, None, *names])
        options = [
            {"prompt_column": name},
            {"messages_column": name},
            {"token_ids_column": name},
            {"template": "{{ row | tojson }}", "reorder_fields": rng.random() < 0.5},
            {"template": "{{ p }}{% for x in q %}{{ x }}{% endfor %}"},
        ]
        return PromptSpec(**rng.choice(options), max_tokens_column=limit)

    def _written(self, table):
        try:
            pq.write_table(table, self._path, row_group_size=3)
        except (pa.ArrowException, OSError, ValueError, TypeError):
            return False  # not every type has a place in Parquet
        return True
