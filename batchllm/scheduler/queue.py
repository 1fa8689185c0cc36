"""Who is admitted next."""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class AdmissionQueue:
    """Sequences in their policy's order; preempted ones come back to the head."""

    def __init__(self, order: Ints) -> None:
        self._order = order
        self._next = 0
        self._returned: list[int] = []  # the last one returned is the head

    def __len__(self) -> int:
        return len(self._returned) + len(self._order) - self._next

    def peek(self, limit: int) -> Ints:
        """The first `limit` sequences, fewer at the end of the queue."""
        returned = self._returned[::-1][:limit]
        rest = self._order[self._next : self._next + limit - len(returned)]
        return np.concatenate([np.array(returned, dtype=np.int64), rest]) if returned else rest

    def pop(self, count: int) -> None:
        """Remove the first `count`."""
        returned = min(count, len(self._returned))
        if returned:
            del self._returned[-returned:]
        self._next += count - returned

    def not_begun(self) -> Ints:
        """Those that were never admitted, in order."""
        return self._order[self._next :]

    def rearrange(self, order: Ints) -> None:
        """Give those that were never admitted another order."""
        assert np.array_equal(np.sort(order), np.sort(self.not_begun())), "others were asked for"
        self._order, self._next = order, 0

    def put_back(self, sequence: int) -> None:
        """Make a preempted sequence the head."""
        self._returned.append(sequence)

    def drop(self, sequences: Ints) -> None:
        """Let preempted sequences wait no longer."""
        gone = set(sequences.tolist())
        assert gone <= set(self._returned), "not all of them were preempted"
        self._returned = [sequence for sequence in self._returned if sequence not in gone]
