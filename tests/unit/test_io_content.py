"""A table's hash: blind to batches, and to nothing else."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm.io.content import ContentHash

SCHEMA = pa.schema([("t", pa.string()), ("n", pa.int32())])
ROWS = st.lists(
    st.tuples(st.none() | st.text(max_size=3), st.none() | st.integers(-1, 2)), max_size=8
)


def table(rows):
    return pa.table({"t": [t for t, _ in rows], "n": [n for _, n in rows]}, schema=SCHEMA)


def digest(*tables):
    content = ContentHash(SCHEMA)
    for one in tables:
        content.update(one)
    return content.hexdigest()


@given(rows=ROWS, cut=st.integers(0, 8))
def test_where_tables_are_cut_leaves_no_trace(rows, cut):
    whole = table(rows)
    assert digest(whole) == digest(whole.slice(0, cut), whole.slice(cut))
    assert digest(whole) == digest(table(rows[:cut]), table(rows[cut:]))


@given(first=ROWS, second=ROWS)
def test_other_rows_have_another_hash(first, second):
    assert (digest(table(first)) == digest(table(second))) == (first == second)


@pytest.mark.parametrize("names", [("t", "m"), ("n", "t")])
def test_names_and_types_count(names):
    other = pa.schema(
        [pa.field(name, column.type) for name, column in zip(names, SCHEMA, strict=True)]
    )
    assert ContentHash(other).hexdigest() != digest(table([]))


def test_what_lies_under_a_null_does_not_count():
    hidden = pa.Array.from_buffers(
        pa.string(),
        2,
        [pa.py_buffer(b"\x02"), pa.array([0, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"xyz")],
    )
    assert hidden.to_pylist() == [None, "z"]
    dirty = pa.table({"t": hidden, "n": [1, 2]}, schema=SCHEMA)
    assert digest(dirty) == digest(table([(None, 1), ("z", 2)]))
