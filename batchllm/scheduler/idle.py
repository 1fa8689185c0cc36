"""KV that nobody needs right now."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from batchllm.cache.block_pool import BlockPool
from batchllm.cache.block_table import BlockHolder
from batchllm.scheduler.state import NOBODY, Segments

Ints = NDArray[np.int64]


class IdleNodes:
    """Nodes with KV that only waiting sequences need: kept as long as there is room.

    When blocks run short, nodes are dropped, longest unneeded first, those above the sequence that
    is next last; a node falls idle after the nodes below it, and is dropped after them. A dropped
    node is computed again when its turn comes.
    """

    def __init__(self, state: Segments, tables: BlockHolder, pool: BlockPool) -> None:
        self._state = state
        self._tables = tables
        self._pool = pool
        self._nodes: dict[int, None] = {}  # the longest unneeded first

    def __iter__(self) -> Iterator[int]:
        return iter(self._nodes)

    def add(self, nodes: Ints) -> None:
        """Nodes that no running sequence needs any more, descendants first."""
        held = nodes[self._tables.num_held[nodes] > 0]
        self._nodes |= dict.fromkeys(held.tolist())

    def remove(self, nodes: Ints) -> None:
        """Nodes that are needed again, or never will be."""
        for node in nodes.tolist():
            self._nodes.pop(node, None)

    def reclaim(self, count: int, next_up: Ints) -> bool:
        """Have `count` blocks free, dropping nodes if need be; false if that is not enough.

        `next_up` is the sequence that is next, or none.
        """
        if self._pool.num_free < count and self._nodes:
            spared = self._path(next_up)
            while self._pool.num_free < count and self._nodes:
                oldest = next(iter(self._nodes))
                self._drop(next((n for n in self._nodes if n not in spared), oldest))
        return self._pool.num_free >= count

    def _path(self, next_up: Ints) -> set[int]:
        """The nodes above a sequence."""
        path: set[int] = set()
        for sequence in next_up.tolist():
            segment = sequence
            while (segment := int(self._state.parent[segment])) != NOBODY:
                path.add(segment)
        return path

    def _drop(self, node: int) -> None:
        del self._nodes[node]
        dropped = np.array([node])
        self._tables.release(dropped)
        self._state.drop(dropped)
