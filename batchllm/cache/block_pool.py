"""The pool of KV blocks."""

import numpy as np
from numpy.typing import NDArray

from batchllm.errors import UsageError

BlockIds = NDArray[np.int32]


class BlockPool:
    """Hands out KV blocks and takes them back.

    Every block has exactly one owner, a tree node or a sequence, so there are no reference counts:
    who shares a block holds its owner. Freed blocks are handed out again last-in first-out, while
    they are still in the caches. The pool never evicts; when it is empty, the scheduler decides.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1:
            raise UsageError(f"the KV pool has {num_blocks} blocks; it needs at least one")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.peak_used = 0
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_used(self) -> int:
        return self.num_blocks - self._num_free

    def allocate(self, count: int) -> BlockIds:
        """Take `count` blocks; the caller has checked `num_free`."""
        assert 0 <= count <= self._num_free, f"{count} blocks asked, {self._num_free} free"
        left = self._num_free - count
        taken = self._stack[left : self._num_free][::-1].copy()
        self._num_free = left
        self.peak_used = max(self.peak_used, self.num_used)
        return taken

    def free(self, block_ids: BlockIds) -> None:
        """Give blocks back."""
        end = self._num_free + len(block_ids)
        assert end <= self.num_blocks, "a block was freed twice"
        self._stack[self._num_free : end] = block_ids[::-1]
        self._num_free = end

    def check(self, held: BlockIds) -> None:
        """Assert that every block is either free or in `held`, once (for tests)."""
        everything = np.sort(np.concatenate([self._stack[: self._num_free], held]))
        whole = np.arange(self.num_blocks)
        assert np.array_equal(everything, whole), "a block is lost or held twice"
