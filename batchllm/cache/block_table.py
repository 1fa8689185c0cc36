"""Which blocks hold whose KV."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from batchllm.cache.block_pool import BlockIds, BlockPool

Ints = NDArray[np.int64]
_NO_ROW = -1


class BlockHolder(Protocol):
    """Who holds how many blocks: `BlockTables`, or `BlockCounts` where nothing is stored."""

    num_held: Ints

    def grow(self, owners: Ints, num_blocks: Ints) -> None: ...

    def append(self, owners: Ints) -> None: ...

    def release(self, owners: Ints) -> None: ...

    def gather(self, owners: Ints) -> BlockIds: ...

    def check(self) -> None: ...


class BlockTables:
    """The blocks of many owners, numbered from 0, changed for many at once.

    An owner has a row of one table as long as it holds blocks; its first `num_held` entries are
    its blocks, in the order of its tokens. Rows are reused, so the table is as high as the most
    owners that ever held blocks at the same time, and as wide as the longest of them.
    """

    def __init__(self, pool: BlockPool, num_owners: int) -> None:
        self._pool = pool
        self._row: Ints = np.full(num_owners, _NO_ROW, dtype=np.int64)
        self.num_held: Ints = np.zeros(num_owners, dtype=np.int64)
        self._ids: BlockIds = np.zeros((64, 16), dtype=np.int32)
        self._free_rows: Ints = np.arange(63, -1, -1, dtype=np.int64)
        self._num_free_rows = 64

    def grow(self, owners: Ints, num_blocks: Ints) -> None:
        """Give each owner blocks until it holds `num_blocks`; both [n], owners distinct.

        The caller has checked that the pool has them.
        """
        held = self.num_held[owners]
        missing = num_blocks - held
        total = int(missing.sum())
        if total == 0:
            return
        wanting = missing > 0
        owners, held, missing = owners[wanting], held[wanting], missing[wanting]
        self._give_rows(owners[held == 0])
        widest = int((held + missing).max())
        if widest > self._ids.shape[1]:
            self._widen(widest)
        rows, columns = _ranges(self._row[owners], held, missing)
        self._ids[rows, columns] = self._pool.allocate(total)
        self.num_held[owners] += missing

    def append(self, owners: Ints) -> None:
        """Give each owner, holding some, one block more; [n], distinct. As `grow`, for decodes."""
        if len(owners) == 0:
            return
        held = self.num_held[owners]
        if int(held.max()) >= self._ids.shape[1]:
            self._widen(int(held.max()) + 1)
        self._ids[self._row[owners], held] = self._pool.allocate(len(owners))
        self.num_held[owners] = held + 1

    def release(self, owners: Ints) -> None:
        """Give all blocks of the owners back (none is fine); owners distinct."""
        owners = owners[self.num_held[owners] > 0]
        if len(owners) == 0:
            return
        rows = self._row[owners]
        self._pool.free(self._ids[_ranges(rows, np.zeros_like(rows), self.num_held[owners])])
        self.num_held[owners] = 0
        self._row[owners] = _NO_ROW
        end = self._num_free_rows + len(rows)
        self._free_rows[self._num_free_rows : end] = rows
        self._num_free_rows = end

    def gather(self, owners: Ints) -> BlockIds:
        """Blocks of each owner, [n, widest of them]; what lies beyond `num_held` is arbitrary."""
        if len(owners) == 0:
            return np.zeros((0, 0), dtype=np.int32)
        width = int(self.num_held[owners].max())
        return self._ids[self._row[owners], :width]

    def check(self) -> None:
        """Assert that every block is free or has one holder (for tests)."""
        self._pool.check(self.held())

    def held(self) -> BlockIds:
        """All blocks anyone holds (for tests)."""
        owners = np.flatnonzero(self.num_held)
        rows = self._row[owners]
        return self._ids[_ranges(rows, np.zeros_like(rows), self.num_held[owners])]

    def _widen(self, widest: int) -> None:
        extra = max(widest, 2 * self._ids.shape[1]) - self._ids.shape[1]
        self._ids = np.pad(self._ids, ((0, 0), (0, extra)))

    def _give_rows(self, owners: Ints) -> None:
        if len(owners) > self._num_free_rows:
            height = len(self._ids)
            extra = max(height, len(owners))
            self._ids = np.pad(self._ids, ((0, extra), (0, 0)))
            free = np.empty(height + extra, dtype=np.int64)
            free[:extra] = np.arange(height + extra - 1, height - 1, -1)
            free[extra : extra + self._num_free_rows] = self._free_rows[: self._num_free_rows]
            self._free_rows, self._num_free_rows = free, self._num_free_rows + extra
        left = self._num_free_rows - len(owners)
        self._row[owners] = self._free_rows[left : self._num_free_rows]
        self._num_free_rows = left


def _ranges(rows: Ints, begin: Ints, count: Ints) -> tuple[Ints, Ints]:
    """Indices of `count[i]` entries of row `rows[i]`, from column `begin[i]` on."""
    ends = np.cumsum(count)
    columns = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(begin - ends + count, count)
    return np.repeat(rows, count), columns
