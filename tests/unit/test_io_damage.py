"""Files that are not what they should be: one line that names the file, never Arrow's traceback."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchllm.errors import InputError
from batchllm.io.parquet import ParquetInput

TABLE = pa.table({"i": range(300), "t": [f"some text of row {i} " * 3 for i in range(300)]})


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(TABLE, path, row_group_size=100, write_page_checksum=True)
    return path


def read(path):
    return pa.concat_tables([rows.table for rows in ParquetInput(path).read()])


def fails(path, action=read):
    with pytest.raises(InputError) as caught:
        action(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"PK", "not a Parquet file"),
        (b"a,b,c\n1,2,3\n" * 100, "not a Parquet file"),
        (b"PAR1", "truncated"),
        (b"PAR1PAR1", "truncated"),
        (b"PAR1" + b"\0" * 100 + b"PAR1", "damaged"),
    ],
)
def test_what_is_no_parquet_file_says_what_is_wrong(path, content, message):
    path.write_bytes(content)
    assert message in fails(path, ParquetInput)


def test_one_bad_file_among_good_ones_is_named(path):
    bad = path.with_name("b.parquet")
    bad.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"b\.parquet: the Parquet file is truncated"):
        ParquetInput(path.parent)


def test_truncation_at_any_length_is_an_input_error(path):
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 61), *range(len(whole) - 40, len(whole))}:
        path.write_bytes(whole[:length])
        fails(path, ParquetInput)


def page_bytes(path, group):
    """Where the pages of a row group lie, from its first column's to the next group's."""
    metadata = pq.ParquetFile(path).metadata
    starts = [
        min(
            metadata.row_group(g).column(c).dictionary_page_offset
            or metadata.row_group(g).column(c).data_page_offset
            for c in range(metadata.num_columns)
        )
        for g in range(metadata.num_row_groups)
    ]
    return slice(starts[group], starts[group + 1])


def test_damage_in_a_page_names_file_and_rows_and_spares_other_row_groups(path):
    content = bytearray(path.read_bytes())
    where = page_bytes(path, 1)
    content[where] = b"\xff" * (where.stop - where.start)
    path.write_bytes(content)
    assert "rows 100 to 199 cannot be read: " in fails(path)
    wanted = np.arange(300) // 100 != 1
    first, last = ParquetInput(path).read(wanted)
    assert first.table.equals(TABLE.slice(0, 100))
    assert last.table.equals(TABLE.slice(200, 100))


def test_one_flipped_bit_in_a_page_is_found_by_its_checksum(path):
    options = {"row_group_size": 100, "compression": "none", "use_dictionary": False}
    pq.write_table(TABLE, path, write_page_checksum=True, **options)
    content = bytearray(path.read_bytes())
    where = page_bytes(path, 0)
    content[(where.start + where.stop) // 2] ^= 1
    path.write_bytes(content)
    assert "rows 0 to 99 cannot be read" in fails(path)


def test_a_file_cut_or_replaced_while_it_is_read_is_an_input_error(path):
    whole = path.read_bytes()
    opened = ParquetInput(path)
    path.write_bytes(whole[: len(whole) // 2])
    fails(path, lambda _: list(opened.read()))
    pq.write_table(TABLE, path, row_group_size=50)
    assert "changed while" in fails(path, lambda _: list(opened.read()))
    path.unlink()
    assert "No such file" in fails(path, lambda _: list(opened.read()))
    assert "No such file" in fails(path, lambda _: opened.content_hash())


def test_a_file_cut_behind_an_open_reader_names_the_rows(path):
    opened = ParquetInput(path)
    pieces = opened.read()
    next(pieces)
    with path.open("r+b") as file:
        file.truncate(page_bytes(path, 1).start + 10)
    with pytest.raises(InputError, match=r"a\.parquet: rows \d+ to \d+ cannot be read"):
        list(pieces)


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_random_damage_never_escapes_as_another_error(path, compression):
    pq.write_table(TABLE, path, row_group_size=100, compression=compression)
    whole = path.read_bytes()
    rng = random.Random(3)
    num_found = 0
    for _ in range(80):
        content = bytearray(whole)
        for _ in range(4):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            read(path)
        except InputError as error:
            num_found += 1
            assert "\n" not in str(error)
    assert num_found > 10


def test_a_file_without_read_permission_says_so(path, monkeypatch):
    def denied(name):
        raise PermissionError(13, f"Failed to open local file '{name}'")

    monkeypatch.setattr(pa, "OSFile", denied)
    assert fails(path).endswith("cannot be read: Permission denied")


def test_columns_metadata_is_looked_at_only_after_a_read(path, monkeypatch):
    """Damage in it makes a read fail, but Arrow end the process where it is looked at."""

    def fails_to_read(*arguments):
        raise pa.ArrowInvalid("Definition level histogram size mismatch")
        yield

    def looked_at(*arguments):
        raise AssertionError("looked at before it was read")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fails_to_read)
    monkeypatch.setattr("batchllm.io.row_groups.ParquetReader._batch_rows", looked_at)
    assert "rows 0 to 99 cannot be read: Definition level" in fails(path)


def test_a_nested_name_that_is_not_utf_8_is_no_crash(path):
    pq.write_table(pa.table({"s": [{"inner": 1}]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"inner", b"inn\xffr"))
    fails(path)
