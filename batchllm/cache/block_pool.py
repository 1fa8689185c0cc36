"""The pool of KV blocks."""

from batchllm.errors import UsageError


class BlockPool:
    """Hands out KV blocks and takes them back.

    Every block has exactly one owner, a tree node or a sequence, so there are no reference counts:
    who shares a block holds its owner. Freed blocks are handed out again last-in first-out, while
    they are still in the caches. The pool never evicts; when it is empty, `allocate` says so and
    the scheduler decides.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1:
            raise UsageError(f"the KV pool has {num_blocks} blocks; it needs at least one")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.peak_used = 0
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` of one owner occupy, the last one perhaps part-filled."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has checked `num_free`."""
        assert 0 <= count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        if count == 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        self.peak_used = max(self.peak_used, self.num_used)
        return taken

    def free(self, block_ids: list[int]) -> None:
        """Give blocks back."""
        self._free.extend(reversed(block_ids))
        assert len(self._free) <= self.num_blocks, "a block was freed twice"

    def check(self, held: list[int]) -> None:
        """Assert that every block is either free or in `held`, once (for tests)."""
        everything = sorted([*self._free, *held])
        assert everything == list(range(self.num_blocks)), "a block is lost or held twice"
