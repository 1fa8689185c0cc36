"""Row ranges: half-open intervals of whole-dataset row numbers, the currency of resuming."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class RowRange:
    """Rows `start <= row < end` of the whole dataset.

    Raises:
        ValueError: the bounds are negative or the wrong way round.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"row range [{self.start}, {self.end}) is not 0 <= start <= end")

    @property
    def num_rows(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"rows {self.start} to {self.end - 1}"


def gaps(num_rows: int, finished: Iterable[RowRange]) -> list[RowRange]:
    """The maximal ranges of `[0, num_rows)` that no range of `finished` covers, ascending.

    `finished` may come in any order and may overlap.

    Raises:
        ValueError: a finished range ends beyond `num_rows`.
    """
    found: list[RowRange] = []
    covered_to = 0
    for done in sorted(finished):
        if done.end > num_rows:
            raise ValueError(f"finished {done}, but there are only {num_rows} rows")
        if done.start == done.end:
            continue
        if done.start > covered_to:
            found.append(RowRange(covered_to, done.start))
        covered_to = max(covered_to, done.end)
    if covered_to < num_rows:
        found.append(RowRange(covered_to, num_rows))
    return found


def pending(num_rows: int, finished: Iterable[RowRange], window_rows: int) -> list[RowRange]:
    """The windows still to do, ascending: every gap cut into at most `window_rows` rows each.

    Finished ranges need not be multiples of `window_rows`, so a job can resume with another
    window size.

    Raises:
        ValueError: `window_rows` is below 1, or a finished range ends beyond `num_rows`.
    """
    if window_rows < 1:
        raise ValueError(f"window_rows is {window_rows}; it must be at least 1")
    return [
        RowRange(start, min(start + window_rows, gap.end))
        for gap in gaps(num_rows, finished)
        for start in range(gap.start, gap.end, window_rows)
    ]
