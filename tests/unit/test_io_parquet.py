"""Reading Parquet: the right rows, the right schema, each row group decoded once."""

import decimal
import random

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchllm.errors import InputError
from batchllm.io.parquet import ParquetInput


def write(path, table, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def read(source, **options):
    opened = ParquetInput(source)
    pieces = list(opened.read(**options))
    assert all(piece.table.schema.equals(opened.schema, True) for piece in pieces)
    numbers = [number for piece in pieces for number in piece.index.tolist()]
    assert numbers == list(range(opened.num_rows))
    return pa.concat_tables([p.table for p in pieces] or [opened.schema.empty_table()])


def marked(num_rows, *rows):
    mask = np.zeros(num_rows, dtype=np.bool_)
    mask[list(rows)] = True
    return mask


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Row i of the data set has i in its column; files and row groups of uneven sizes, some 0."""
    root = tmp_path_factory.mktemp("shards")
    at = 0
    for number, (rows, group) in enumerate([(5, 2), (0, 1), (7, 7), (1, 1), (0, 1), (11, 3)]):
        table = pa.table({"i": pa.array(range(at, at + rows), pa.int64())})
        write(root / f"{number}.parquet", table, row_group_size=group)
        at += rows
    return ParquetInput(root)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(wanted=st.lists(st.booleans(), max_size=24))
def test_just_the_wanted_rows_come(shards, wanted):
    pieces = list(shards.read(np.array(wanted, dtype=np.bool_)))
    assert all(piece.table.num_rows for piece in pieces)
    expected = [row for row, is_wanted in enumerate(wanted) if is_wanted]
    assert [row for piece in pieces for row in piece.index.tolist()] == expected
    assert [row for piece in pieces for row in piece.table["i"].to_pylist()] == expected


def test_columns_are_chosen_wherever_they_come_from(tmp_path):
    write(tmp_path / "k=1/a.parquet", pa.table({"a.b": [1, 2], "c": [{"d": 5}, {"d": 6}]}))
    write(tmp_path / "k=2/b.parquet", pa.table({"c": [{"d": 7}]}))
    opened = ParquetInput(tmp_path)
    wanted = marked(3, 0, 2)
    for columns, values in {
        ("k",): [[1], [2]],
        ("c", "a.b"): [[{"d": 5}, 1], [{"d": 7}, None]],
        ("a.b", "k"): [[1, 1], [None, 2]],
    }.items():
        table = pa.concat_tables(rows.table for rows in opened.read(wanted, columns))
        assert table.column_names == list(columns)
        assert [list(row.values()) for row in table.to_pylist()] == values


def test_sizes_and_files(shards):
    assert shards.num_rows == 24
    assert [path.name for path in shards.files] == [f"{i}.parquet" for i in range(6)]
    assert shards.size_bytes == sum(path.stat().st_size for path in shards.files)


def test_no_rows_is_fine(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"x": pa.array([], pa.string())}))
    opened = ParquetInput(path)
    assert (opened.num_rows, list(opened.read())) == (0, [])
    assert opened.schema.names == ["x"]


def typed_table():
    n = 50
    words = [random.Random(i).choice(["red", "green", None]) for i in range(n)]
    return pa.table(
        {
            "dictionary": pa.array(words).dictionary_encode(),
            "ordered": pa.DictionaryArray.from_arrays(
                pa.array([i % 2 for i in range(n)], pa.int8()), pa.array(["x", "y"]), ordered=True
            ),
            "large": pa.array(words, pa.large_string()),
            "view": pa.array(words, pa.string_view()),
            "utc": pa.array(range(n), pa.timestamp("us", "UTC")),
            "nanos": pa.array(range(n), pa.timestamp("ns")),
            "decimal": pa.array(
                [decimal.Decimal(f"{i}.25") for i in range(n)], pa.decimal128(9, 2)
            ),
            "nested": pa.array([{"a": [i, None], "b": {"c": str(i)}} for i in range(n)]),
            "lists": pa.array([[i] * (i % 4) or None for i in range(n)]),
            "map": pa.array([[("k", i)] for i in range(n)], pa.map_(pa.string(), pa.int32())),
            "fixed": pa.array([[i, i] for i in range(n)], pa.list_(pa.float32(), 2)),
            "coded": pa.array([[{"d": w}] for w in words]),
            "null": pa.nulls(n),
            "bytes": pa.array([bytes([i]) for i in range(n)]),
            "half": pa.array([i / 2 for i in range(n)], pa.float16()),
            "unsigned": pa.array(range(n), pa.uint8()),
            "date": pa.array(range(n), pa.date32()),
        },
        metadata={"pandas": '{"index_columns": []}', "custom": "kept"},
    )


def test_types_values_and_metadata_come_through(tmp_path):
    table = typed_table()
    path = write(tmp_path / "a.parquet", table, row_group_size=20)
    result = read(path)
    assert result.equals(pq.read_table(path))
    assert result["dictionary"].type == pa.dictionary(pa.int32(), pa.string())
    assert result["ordered"].type == table["ordered"].type
    assert result["nested"].to_pylist() == table["nested"].to_pylist()
    assert result.schema.metadata == {b"pandas": b'{"index_columns": []}', b"custom": b"kept"}


def test_metadata_added_to_the_file_alone_is_kept_too(tmp_path):
    table = pa.table({"a": [1]}, metadata={"custom": "kept"})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"added": "late", "batchllm": "{}"})
    assert ParquetInput(tmp_path).schema.metadata == {b"custom": b"kept", b"added": b"late"}


@pytest.mark.parametrize(
    "values",
    [
        ["1", "-2", "007"],
        ["1", "x"],
        ["1", "3000000000"],
        ["1", "__HIVE_DEFAULT_PARTITION__"],
        ["a%20b", "c"],
        ["1.5", "2"],
        ["true", "false"],
        ["", "1"],
    ],
)
def test_hive_columns_are_what_pyarrow_infers(tmp_path, values):
    for number, value in enumerate(values):
        table = pa.table({"i": [number] * 3})
        write(tmp_path / f"part={value}" / "kind=z" / f"{number}.parquet", table)
    theirs = ds.dataset(tmp_path, format="parquet", partitioning="hive")
    ours = read(tmp_path)
    assert ours.schema == theirs.schema
    rows = ours.sort_by("i").to_pylist()
    assert rows == theirs.to_table().sort_by("i").to_pylist()


def test_a_files_own_column_comes_before_the_hive_key(tmp_path):
    write(tmp_path / "k=1/a.parquet", pa.table({"k": ["own"]}))
    write(tmp_path / "k=2/b.parquet", pa.table({"k": ["two"]}))
    assert read(tmp_path)["k"].to_pylist() == ["own", "two"]
    write(tmp_path / "k=x/c.parquet", pa.table({"other": [1]}))
    assert read(tmp_path)["k"].to_pylist() == ["own", "two", "x"]


def test_files_are_cast_to_one_schema(tmp_path):
    write(
        tmp_path / "1.parquet",
        pa.table({"n": pa.array([1], pa.int32()), "t": ["x"], "null": pa.nulls(1)}),
    )
    write(
        tmp_path / "2.parquet",
        pa.table({"t": pa.array(["y"]).dictionary_encode(), "n": [2**40], "null": [{"a": [1]}]}),
    )
    write(
        tmp_path / "3.parquet", pa.table({"new": [True], "t": pa.array(["z"], pa.large_string())})
    )
    table = read(tmp_path)
    assert table.schema.names == ["n", "t", "null", "new"]
    assert table.schema.field("n").type == pa.int64()
    assert table.schema.field("t").type == pa.large_string()
    assert table.to_pylist() == [
        {"n": 1, "t": "x", "null": None, "new": None},
        {"n": 2**40, "t": "y", "null": {"a": [1]}, "new": None},
        {"n": None, "t": "z", "null": None, "new": True},
    ]


def test_a_required_column_that_a_file_lacks_may_be_null(tmp_path):
    required = pa.schema([pa.field("a", pa.int64(), nullable=False), pa.field("b", pa.int64())])
    write(tmp_path / "1.parquet", pa.table({"a": [1], "b": [1]}, schema=required))
    assert not ParquetInput(tmp_path).schema.field("a").nullable
    write(tmp_path / "2.parquet", pa.table({"b": [2]}))
    assert ParquetInput(tmp_path).schema.field("a").nullable
    assert read(tmp_path)["a"].to_pylist() == [1, None]


def test_schemas_that_cannot_be_joined_name_both_files_and_the_column(tmp_path):
    write(tmp_path / "1.parquet", pa.table({"a": [1], "b": ["x"]}))
    write(tmp_path / "2.parquet", pa.table({"a": [2], "b": [[7]]}))
    with pytest.raises(InputError) as caught:
        ParquetInput(tmp_path)
    for part in ("1.parquet", "2.parquet", "'b'", "string", "list"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_that_appears_twice_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", pa.Table.from_arrays([[1], [2]], names=["a", "a"]))
    with pytest.raises(InputError, match="column 'a' appears more than once"):
        ParquetInput(path)


def test_a_value_that_does_not_survive_the_cast_names_its_rows(tmp_path):
    write(tmp_path / "1.parquet", pa.table({"a": [0.5]}))
    write(tmp_path / "2.parquet", pa.table({"a": [1, 2**53 + 1]}))
    with pytest.raises(InputError, match=r"2\.parquet: rows 1 to 2 cannot be read"):
        read(tmp_path)


@pytest.fixture
def decoded_rows(monkeypatch):
    """How many rows Arrow was made to decode, and how often a row group was begun.

    But for the one row that is read first to see whether a row group's metadata is whole.
    """
    count = {"rows": 0, "groups": 0}
    original = pq.ParquetFile.iter_batches

    def counting(self, batch_size, *args):
        if batch_size == 1:
            yield from original(self, batch_size, *args)
            return
        count["groups"] += 1
        for batch in original(self, batch_size, *args):
            count["rows"] += batch.num_rows
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    return count


def test_a_huge_row_group_is_decoded_once_and_never_held(tmp_path, decoded_rows):
    rng = random.Random(0)
    table = pa.table({"t": [rng.randbytes(500).hex() for _ in range(30_000)]})
    path = write(tmp_path / "a.parquet", table, compression="none", row_group_size=30_000)
    total = table.nbytes
    expected = table["t"].to_pylist()
    del table
    opened = ParquetInput(path)
    before, peak = pa.total_allocated_bytes(), 0
    for rows in opened.read():
        peak = max(peak, pa.total_allocated_bytes() - before)
        assert rows.table["t"].to_pylist() == expected[rows.index[0] : rows.index[-1] + 1]
    assert decoded_rows == {"rows": 30_000, "groups": 1}
    assert peak < total / 3


def test_row_groups_without_a_wanted_row_are_not_read(tmp_path, decoded_rows):
    path = write(tmp_path / "a.parquet", pa.table({"i": range(100)}), row_group_size=10)
    opened = ParquetInput(path)
    pieces = list(opened.read(marked(100, 5, 8, 11, 77, 78)))
    assert [p.table["i"].to_pylist() for p in pieces] == [[5, 8], [11], [77, 78]]
    assert decoded_rows == {"rows": 30, "groups": 3}


def test_wide_rows_come_in_small_batches(tmp_path, monkeypatch):
    sizes = []
    original = pq.ParquetFile.iter_batches

    def recording(self, batch_size, groups, columns):
        sizes.append(batch_size)
        return original(self, batch_size, groups, columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", recording)
    wide = pa.table({"t": [random.Random(i).randbytes(1_000_000) for i in range(12)]})
    read(write(tmp_path / "a.parquet", wide, compression="none"))
    read(write(tmp_path / "b.parquet", pa.table({"i": range(5000)})))
    assert sizes == [1, 8, 1, 2048]  # one row to see whether the metadata is whole


def test_files_are_closed_when_a_reader_stops_early(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"i": range(100)}), row_group_size=10)
    pieces = ParquetInput(path).read()
    next(pieces)
    reader = pieces.gi_frame.f_locals["reader"]
    pieces.close()
    assert reader._source.closed


def test_the_content_hash_follows_names_and_bytes_only(tmp_path):
    for root in ("one", "two"):
        write(tmp_path / root / "a.parquet", pa.table({"i": [1]}))
        write(tmp_path / root / "k=1" / "b.parquet", pa.table({"i": [2]}))
    one = ParquetInput(tmp_path / "one").content_hash()
    assert len(one) == 64
    assert ParquetInput(tmp_path / "two").content_hash() == one
    write(tmp_path / "two/k=1/b.parquet", pa.table({"i": [3]}))
    changed = ParquetInput(tmp_path / "two").content_hash()
    (tmp_path / "one/k=1").rename(tmp_path / "one/k=2")
    moved = ParquetInput(tmp_path / "one").content_hash()
    assert len({one, changed, moved}) == 3
