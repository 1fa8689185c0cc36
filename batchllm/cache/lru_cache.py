"""A block pool that keeps freed blocks until it needs them: what streaming engines do."""

from collections import OrderedDict
from collections.abc import Sequence

_NO_KEY = -1


class LRUBlockCache:
    """KV blocks by content, shared by reference count, evicted least recently used first.

    Idea (vLLM's automatic prefix caching): a full block is known by a key that stands for all
    tokens up to its end; who needs the same tokens takes the block instead of computing it. A full
    block that nobody uses any more keeps its content until it is handed out again, longest unused
    first; blocks that hold nothing to be found are handed out before those. The trade-off
    against planning: what is still there when it is needed is a matter of luck.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.peak_used = 0
        self._users = [0] * num_blocks
        self._key = [_NO_KEY] * num_blocks
        self._block: dict[int, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # the last one is handed out next
        # With content, the oldest first. (A plain dict is slow to find its first key again.)
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks nobody uses, with content or without."""
        return len(self._blank) + len(self._unused)

    def find(self, keys: Sequence[int]) -> list[int]:
        """The blocks of the longest run of `keys`, from the first, whose content is there."""
        found = []
        for key in keys:
            block = self._block.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_unused(self, blocks: Sequence[int]) -> int:
        """How many of the blocks count as free."""
        return sum(self._users[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Use blocks that hold what is needed."""
        for block in blocks:
            if self._users[block] == 0:
                del self._unused[block]
            self._users[block] += 1
        self._note_use()

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, forgetting what they held; the caller has checked `num_free`."""
        blank, unused = self._blank, self._unused
        left = max(len(blank) - count, 0)
        taken = blank[left:][::-1]
        del blank[left:]
        taken += [unused.popitem(last=False)[0] for _ in range(count - len(taken))]
        known, key_of, users = self._block, self._key, self._users
        for block in taken:
            key = key_of[block]
            if key != _NO_KEY:
                if known.get(key) == block:
                    del known[key]
                key_of[block] = _NO_KEY
            users[block] = 1
        self._note_use()
        return taken

    def remember(self, blocks: Sequence[int], keys: Sequence[int]) -> None:
        """Let full blocks be found by their keys; the first block of a key stays the one found."""
        known, key_of = self._block, self._key
        for block, key in zip(blocks, keys, strict=True):
            key_of[block] = key
            known.setdefault(key, block)

    def forget(self) -> None:
        """Let no block be found any more; nobody uses one."""
        assert self.num_free == self.num_blocks, "blocks are in use"
        self._block.clear()
        self._key = [_NO_KEY] * self.num_blocks
        self._blank += self._unused
        self._unused.clear()

    def release(self, blocks: Sequence[int], num_full: int) -> None:
        """Stop using blocks, in the order of their tokens, of which the first `num_full` are full.

        The last of those is evicted first.
        """
        users = self._users
        for place in range(len(blocks) - 1, -1, -1):
            block = blocks[place]
            users[block] -= 1
            assert users[block] >= 0, "a block was freed twice"
            if users[block]:
                continue
            if place < num_full:
                self._unused[block] = None
            else:
                self._blank.append(block)

    def check(self, held: Sequence[int]) -> None:
        """Assert that users and free blocks are what the tables `held` say (for tests)."""
        users = [0] * self.num_blocks
        for block in held:
            users[block] += 1
        assert users == self._users, "users do not match the tables"
        free = sorted([*self._blank, *self._unused])
        assert free == [b for b, count in enumerate(users) if count == 0]

    def _note_use(self) -> None:
        self.peak_used = max(self.peak_used, self.num_blocks - self.num_free)
