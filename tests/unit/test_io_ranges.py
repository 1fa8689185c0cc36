"""Row ranges against a brute-force set of rows."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm.io.ranges import RowRange, gaps, pending


@st.composite
def jobs(draw):
    num_rows = draw(st.integers(0, 60))
    bounds = st.tuples(st.integers(0, num_rows), st.integers(0, num_rows))
    finished = [RowRange(min(pair), max(pair)) for pair in draw(st.lists(bounds, max_size=8))]
    return num_rows, finished


@given(jobs(), st.integers(1, 70))
def test_pending_is_every_row_not_finished_once_in_order(job, window_rows):
    num_rows, finished = job
    done = {row for rows in finished for row in range(rows.start, rows.end)}
    windows = pending(num_rows, finished, window_rows)
    listed = [row for rows in windows for row in range(rows.start, rows.end)]
    assert listed == [row for row in range(num_rows) if row not in done]
    assert all(1 <= rows.num_rows <= window_rows for rows in windows)


@given(jobs())
def test_gaps_are_maximal(job):
    num_rows, finished = job
    found = gaps(num_rows, finished)
    assert all(a.end < b.start for a, b in pairwise(found))
    assert found == pending(num_rows, finished, num_rows + 1)


def test_pending_cuts_no_more_than_it_must():
    assert pending(10, [RowRange(4, 6)], 3) == [
        RowRange(0, 3),
        RowRange(3, 4),
        RowRange(6, 9),
        RowRange(9, 10),
    ]


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 2)])
def test_a_range_that_is_none_is_refused(start, end):
    with pytest.raises(ValueError, match="row range"):
        RowRange(start, end)


def test_pending_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="window_rows is 0"):
        pending(3, [], 0)
    with pytest.raises(ValueError, match="only 3 rows"):
        pending(3, [RowRange(2, 4)], 1)


def test_a_range_reads_as_rows():
    assert str(RowRange(3, 6)) == "rows 3 to 5"
    assert RowRange(3, 6).num_rows == 3
