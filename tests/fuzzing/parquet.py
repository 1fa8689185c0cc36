"""Damaged Parquet files, read as a job reads them."""

import datetime
import decimal

import pyarrow as pa
import pyarrow.parquet as pq
from builders import tiny_tokenizer

from batchllm.io.parquet import ParquetInput
from batchllm.text.prompts import PromptBuilder, PromptSpec
from fuzzing.mutate import damaged

_SPECS = [
    PromptSpec(prompt_column="t"),
    PromptSpec(token_ids_column="ids"),
    PromptSpec(messages_column="m"),
    PromptSpec(template="{{ row | tojson }}"),
]


def table():
    rows = 40
    text = [None if i % 7 == 0 else f"text {i % 5} é" * (i % 4) for i in range(rows)]
    columns = {
        "t": pa.array(text),
        "ids": pa.array([[i, 2, 3] if i % 3 else None for i in range(rows)], pa.list_(pa.int32())),
        "m": pa.array([[{"role": "user", "content": str(i)}] for i in range(rows)]),
        "n": pa.array(range(rows), pa.int64()),
        "d": pa.array(text).dictionary_encode(),
        "x": pa.array([i / 3 for i in range(rows)]),
        "b": pa.array([bytes([i]) for i in range(rows)]),
        "when": pa.array([datetime.datetime(2024, 1, 1)] * rows),
        "price": pa.array([decimal.Decimal("1.50")] * rows),
        "map": pa.array([[("k", i)] for i in range(rows)], pa.map_(pa.string(), pa.int32())),
        "deep": pa.array([{"a": {"b": [[{"c": i}]]}} for i in range(rows)]),
    }
    return pa.table(columns, metadata={"k": "v"})


class Parquet:
    """One file, or a directory of a good and a bad one."""

    def __init__(self, scratch):
        self._folder = scratch / "input"
        self._folder.mkdir()
        self._builders = [PromptBuilder(spec, tiny_tokenizer(), 200) for spec in _SPECS]
        self._seeds = []
        for number, options in enumerate(
            [
                {"compression": "none"},
                {"compression": "snappy", "row_group_size": 13},
                {"compression": "zstd", "data_page_version": "2.0"},
                {"compression": "gzip", "use_dictionary": False, "write_page_checksum": True},
                {"compression": "none", "store_schema": False, "version": "1.0"},
            ]
        ):
            path = scratch / f"{number}.parquet"
            pq.write_table(table(), path, **options)
            self._seeds.append(path.read_bytes())

    def run(self, rng):
        whole = rng.choice(self._seeds)
        footer = int.from_bytes(whole[-8:-4], "little")
        if rng.random() < 0.6:  # the footer declares all sizes
            start = len(whole) - 8 - footer
            tail = damaged(rng, whole[start:-8])
            length = len(tail) if rng.random() < 0.8 else rng.choice([0, 2**31, 2**32 - 1, 5])
            data = whole[:start] + tail + length.to_bytes(4, "little") + b"PAR1"
        else:
            data = damaged(rng, whole)
        (self._folder / "a.parquet").write_bytes(data)
        path = self._folder / "a.parquet"
        if rng.random() < 0.1:
            (self._folder / "b.parquet").write_bytes(rng.choice(self._seeds))
            path = self._folder
        source = ParquetInput(path)
        builder = rng.choice(self._builders)
        number = rng.randrange(len(_SPECS))
        _SPECS[number].check(source.schema)
        builder = self._builders[number]
        columns = None if rng.random() < 0.5 else builder.columns_of(source.schema)
        for rows in source.read(columns=columns):
            builder.build(rows.table)
