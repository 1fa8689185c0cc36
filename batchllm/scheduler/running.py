"""Who runs."""

import numpy as np
from numpy.typing import NDArray

from batchllm.scheduler.candidates import Candidates
from batchllm.scheduler.state import ChildCount, Segments

Ints = NDArray[np.int64]
_NONE: Ints = np.zeros(0, dtype=np.int64)


class Running:
    """Admitted sequences that have not finished, and the nodes above them.

    A sequence is first in `work`, behind those of its nodes that have to be computed, then among
    the `decoding`. `work` is in the order in which it is prefilled; a segment leaves it when the
    rest of its tokens is scheduled, and a sequence is decoding when that has given it a token.
    """

    def __init__(self, state: Segments) -> None:
        self.decoding = _NONE  # sequences, ascending
        self.work = _NONE  # segments
        self.nodes = _NONE  # those above running sequences, ascending
        self.below = ChildCount(state.parent)
        self._state = state
        self._count = 0
        self._turn: Ints = np.zeros(state.count, dtype=np.int64)  # of admission
        self._turns = 0

    def __len__(self) -> int:
        return self._count

    def sequences(self) -> Ints:
        """All of them: the decoding ones, then those in the work."""
        return np.concatenate([self.decoding, self.work[self._state.is_leaf(self.work)]])

    def last_admitted(self) -> int:
        """The sequence that was admitted last."""
        sequences = self.sequences()
        return int(sequences[np.argmax(self._turn[sequences])])

    def admit(self, admitted: Candidates) -> Ints:
        """Candidates run from now on; returns the nodes that are needed for them, and were not."""
        sequences, state = admitted.sequences, self._state
        self._count += len(sequences)
        self._turn[sequences] = self._turns + np.arange(len(sequences))
        self._turns += len(sequences)
        state.owner[admitted.nodes] = sequences[admitted.first]
        work = admitted.work(state)
        self.work = np.concatenate([self.work, work]) if len(self.work) else work
        needed = self.below.add(sequences)
        assert len(needed) == len(admitted.nodes)
        if len(needed):
            self.nodes = np.sort(np.concatenate([self.nodes, needed]))
        return needed

    def finish(self, sequences: Ints) -> Ints:
        """Sequences, no longer among the decoding, are through; returns nodes nobody needs now."""
        self._count -= len(sequences)
        unneeded = self.below.remove(sequences)
        if len(unneeded):
            self.nodes = self.nodes[self.below.children[self.nodes] > 0]
        return unneeded

    def preempt(self, sequence: int) -> Ints:
        """A sequence stops, and the nodes that were computed on its way; returns as `finish`."""
        self.decoding = self.decoding[self.decoding != sequence]
        self.work = self.work[self._state.owner[self.work] != sequence]
        return self.finish(np.array([sequence]))

    def check(self, waiting: Ints, unfinished: ChildCount) -> None:
        """Assert that the counts are those of the sequences that run and wait (for tests)."""
        running, parent = self.sequences(), self._state.parent
        assert len(running) == self._count
        assert np.array_equal(self.below.children, ChildCount(parent, running).children)
        everyone = np.concatenate([running, waiting])
        assert np.array_equal(unfinished.children, ChildCount(parent, everyone).children)
        assert np.array_equal(self.nodes, np.flatnonzero(self.below.children))
