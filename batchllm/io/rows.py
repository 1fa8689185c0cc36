"""Rows of the whole dataset, by number: the currency of reading and of resuming."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


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


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows: their numbers in the whole dataset (int64, [num_rows]) and their columns."""

    index: NDArray[np.int64]
    table: pa.Table

    @classmethod
    def concat(cls, pieces: "list[Rows]") -> "Rows":
        """All pieces' rows, one after another; there is at least one piece."""
        return cls(
            np.concatenate([piece.index for piece in pieces]),
            pa.concat_tables([piece.table for piece in pieces]),
        )

    def where(self, mask: NDArray[np.bool_]) -> "Rows":
        """The rows that `mask` [num_rows] marks."""
        if mask.all():
            return self
        return Rows(self.index[mask], self.table.filter(pa.array(mask)))

    def take(self, places: NDArray[np.int64]) -> "Rows":
        """The rows at `places`, in that order."""
        return Rows(self.index[places], self.table.take(pa.array(places)))

    def by_number(self) -> "Rows":
        """The same rows, ascending."""
        if (np.diff(self.index) > 0).all():
            return self
        return self.take(np.argsort(self.index))
