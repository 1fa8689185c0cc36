"""The pool of KV blocks."""

import numpy as np
from numpy.typing import NDArray

from batchllm.errors import UsageError

BlockIds = NDArray[np.int32]


class BlockPool:
    """Hands out KV blocks and takes them back.

    Every block has exactly one owner, a tree node or a sequence, so there are no reference counts:
    who shares a block holds its owner. Freed blocks are handed out again last-in first-out, while
    they are still in the caches; once all are free, in the order in which they lie in memory, since
    neighbours are read faster. The pool never evicts; when it is empty, the scheduler decides.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1:
            raise UsageError(f"the KV pool has {num_blocks} blocks; it needs at least one")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.peak_used = 0
        self._stack = _in_order(num_blocks)
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_used(self) -> int:
        return self.num_blocks - self._num_free

    def allocate(self, count: int) -> BlockIds:
        """Take `count` blocks; the caller has checked `num_free`."""
        left = self._num_free - count
        taken = self._stack[max(left, 0) : self._num_free][::-1].copy()
        self.take(count)
        return taken

    def free(self, block_ids: BlockIds) -> None:
        """Give blocks back."""
        begin = self._num_free
        self.give_back(len(block_ids))
        self._stack[begin : self._num_free] = block_ids[::-1]
        if self._num_free == self.num_blocks:
            self._stack = _in_order(self.num_blocks)

    def take(self, count: int) -> None:
        """Take `count` blocks without asking which; to be given back the same way."""
        assert 0 <= count <= self._num_free, f"{count} blocks asked, {self._num_free} free"
        self._num_free -= count
        self.peak_used = max(self.peak_used, self.num_used)

    def give_back(self, count: int) -> None:
        """Give back `count` blocks of those taken by `take`."""
        assert self._num_free + count <= self.num_blocks, "a block was freed twice"
        self._num_free += count

    def check(self, held: BlockIds) -> None:
        """Assert that every block is either free or in `held`, once (for tests)."""
        everything = np.sort(np.concatenate([self._stack[: self._num_free], held]))
        whole = np.arange(self.num_blocks)
        assert np.array_equal(everything, whole), "a block is lost or held twice"


def _in_order(num_blocks: int) -> BlockIds:
    """A stack with the first block on top."""
    return np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
