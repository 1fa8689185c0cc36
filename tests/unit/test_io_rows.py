"""Row numbers and rows: arithmetic that everything in io leans on."""

import numpy as np
import pyarrow as pa
import pytest

from batchllm.io.rows import RowRange, Rows


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 2)])
def test_a_range_that_is_none_is_refused(start, end):
    with pytest.raises(ValueError, match="row range"):
        RowRange(start, end)


def test_a_range_as_text():
    assert str(RowRange(3, 6)) == "rows 3 to 5"
    assert RowRange(3, 6).num_rows == 3


def test_rows_keep_their_numbers():
    rows = Rows(np.array([7, 2, 5]), pa.table({"i": [7, 2, 5]}))
    both = Rows.concat([rows, Rows(np.array([1]), pa.table({"i": [1]}))])
    for some, expected in (
        (both, [7, 2, 5, 1]),
        (both.by_number(), [1, 2, 5, 7]),
        (both.take(np.array([3, 0])), [1, 7]),
        (both.where(np.array([True, False, True, False])), [7, 5]),
    ):
        assert some.index.tolist() == some.table["i"].to_pylist() == expected
