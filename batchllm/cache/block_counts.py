"""How many blocks everyone holds, where nothing is stored in them."""

import numpy as np
from numpy.typing import NDArray

from batchllm.cache.block_pool import BlockIds, BlockPool

Ints = NDArray[np.int64]


class BlockCounts:
    """`BlockTables` for a simulation: the pool runs short as it would, but no block has a name."""

    def __init__(self, pool: BlockPool, num_owners: int) -> None:
        self._pool = pool
        self.num_held: Ints = np.zeros(num_owners, dtype=np.int64)

    def grow(self, owners: Ints, num_blocks: Ints) -> None:
        """Give each owner blocks until it holds `num_blocks`; both [n], owners distinct."""
        self._pool.take(int((num_blocks - self.num_held[owners]).sum()))
        self.num_held[owners] = num_blocks

    def append(self, owners: Ints) -> None:
        """Give each owner one block more; [n], distinct."""
        self._pool.take(len(owners))
        self.num_held[owners] += 1

    def release(self, owners: Ints) -> None:
        """Give all blocks of the owners back (none is fine); owners distinct."""
        self._pool.give_back(int(self.num_held[owners].sum()))
        self.num_held[owners] = 0

    def gather(self, owners: Ints) -> BlockIds:
        """There are none to gather."""
        raise AssertionError(f"{len(owners)} owners' blocks asked of a simulation")

    def check(self) -> None:
        """Assert that the pool misses as many blocks as are held (for tests)."""
        assert self._pool.num_used == self.num_held.sum(), "a block is lost"
