"""The spool: what goes into a bucket comes out of it, whatever part of it was on disk."""

import os

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchllm.errors import OutputError
from batchllm.io.rows import Rows
from batchllm.io.spool import Spool

SCHEMA = pa.schema(
    [("text", pa.dictionary(pa.int32(), pa.string())), ("nested", pa.list_(pa.int8()))]
)


def rows_of(numbers):
    texts = pa.array([f"text {n % 3}" for n in numbers]).dictionary_encode()
    nested = pa.array([[n % 5] * (n % 3) if n % 4 else None for n in numbers], pa.list_(pa.int8()))
    return Rows(np.array(numbers), pa.Table.from_arrays([texts, nested], schema=SCHEMA))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), max_size=8),
    st.sampled_from([0, 200, 10**9]),
    st.randoms(),
)
def test_a_bucket_gives_its_rows_back(tmp_path, batches, budget, rng):
    spool = Spool(tmp_path / "spool", SCHEMA, 5, budget_bytes=budget)
    numbers = list(range(sum(map(len, batches))))
    rng.shuffle(numbers)
    expected = {bucket: [] for bucket in range(5)}
    left = list(numbers)
    for buckets in batches:
        some, left = left[: len(buckets)], left[len(buckets) :]
        spool.add(rows_of(some), np.array(buckets))
        for number, bucket in zip(some, buckets, strict=True):
            expected[bucket].append(number)
    if budget in (0, 10**9):
        assert (tmp_path / "spool").exists() == (budget == 0 and any(batches))
    assert spool.counts.tolist() == [len(expected[bucket]) for bucket in range(5)]
    for bucket in (3, 0, 4, 1, 2):
        found, wanted = spool.read(bucket), rows_of(sorted(expected[bucket]))
        assert found.index.tolist() == wanted.index.tolist()
        assert found.table.to_pylist() == wanted.table.to_pylist()
        assert found.table.schema == SCHEMA
    spool.close()
    assert not (tmp_path / "spool").exists()


def test_a_full_disk_is_told_in_one_line(tmp_path):
    spool = Spool(tmp_path, SCHEMA, 2, budget_bytes=0)
    (tmp_path / "run-000000").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"cannot hold rows: No space left on device$"):
        spool.add(rows_of([1, 2]), np.array([0, 1]))


def test_a_damaged_run_is_told_in_one_line(tmp_path):
    spool = Spool(tmp_path, SCHEMA, 2, budget_bytes=0)
    spool.add(rows_of([1, 2]), np.array([0, 1]))
    (tmp_path / "run-000000").write_bytes(os.urandom(50))
    with pytest.raises(OutputError, match="cannot hold rows") as caught:
        spool.read(1)
    assert "\n" not in str(caught.value)
