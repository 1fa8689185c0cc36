"""Blocks held in every step to come, as a sum of events."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Events:
    """Changes in the number of blocks held: `amounts[i]` more from step `steps[i]` on, [n]."""

    steps: Ints
    amounts: Ints


def sequence_events(private: Ints, start: Ints, finish: Ints, block_size: int) -> Events:
    """The private blocks of sequences, from their admission (not among the events) to their end.

    A sequence holds `private` tokens. In step `start` it samples a token, and holds one token more
    from the next step on, until it has sampled in step `finish` too and frees everything: steps
    are absolute, all arrays [num_sequences]. The blocks for `private` tokens are not among the
    events, as these are held before; what `finish` frees is.
    """
    first = -(-private // block_size)
    last = -(-(private + finish - start) // block_size)
    gained = last - first
    ends = np.cumsum(gained)
    each = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - gained, gained)
    # Token number b * block_size + 1 opens a block; token private + j is held from start + j on.
    opened = (np.repeat(first, gained) + each) * block_size + 1
    steps = np.repeat(start - private, gained) + opened
    return Events(np.concatenate([steps, finish + 1]), np.concatenate([np.ones_like(steps), -last]))


class Timeline:
    """How many blocks are held in every step to come, as differences from step to step.

    Adding or removing a sequence touches one entry a block. What is held in each step is one
    running sum up to the last step that anything is known about, made when it is asked for.
    """

    def __init__(self) -> None:
        self.now = 0
        self._held = 0  # blocks held in the step before `now`
        self._change: Ints = np.zeros(1024, dtype=np.int64)  # from step `_origin` on
        self._origin = 0
        self._end = 0  # no change from this step on
        # Kept as long as nothing is added:
        self._ahead: Ints | None = None
        self._fullest: tuple[int, int] | None = None

    def add(self, steps: Ints, amounts: Ints) -> None:
        """Hold `amounts[i]` more blocks from step `steps[i]` on; the past counts as now."""
        if len(steps) == 0:
            return
        steps = np.maximum(steps, self.now)
        end = int(steps.max()) + 1
        self._reserve(end)
        np.add.at(self._change, steps - self._origin, amounts)
        self._end = max(self._end, end)
        self._ahead = self._fullest = None

    def advance(self, num_steps: int) -> None:
        """Let steps pass."""
        begin = self.now - self._origin
        self._held += int(self._change[begin : begin + num_steps].sum())
        self.now += num_steps
        if self._ahead is not None:
            self._ahead = self._ahead[num_steps:]

    def ahead(self) -> Ints:
        """Blocks held in the steps from `now` on, at least one; after the last, as in it."""
        if self._ahead is None or len(self._ahead) == 0:
            change = self._change[self.now - self._origin : max(self._end - self._origin, 0)]
            known = change.cumsum() + self._held
            self._ahead = known if len(known) else np.array([self._held])
        return self._ahead

    def fullest(self) -> tuple[int, int]:
        """The first of the steps to come in which most is held, and how much."""
        if self._fullest is None or self._fullest[0] < self.now:
            ahead = self.ahead()
            place = int(ahead.argmax())
            self._fullest = self.now + place, int(ahead[place])
        return self._fullest

    def held_in(self, step: int) -> int:
        """Blocks held in one step to come (for tests)."""
        begin, end = self.now - self._origin, step + 1 - self._origin
        return self._held + int(self._change[begin:end].sum())

    def _reserve(self, end: int) -> None:
        """Make room for changes before step `end`, forgetting the past."""
        if end - self._origin <= len(self._change):
            return
        future = self._change[self.now - self._origin : max(self._end, self.now) - self._origin]
        size = max(len(self._change), 2 * (end - self.now))
        self._change = np.zeros(size, dtype=np.int64)
        self._change[: len(future)] = future
        self._origin = self.now


def first_sample_step(tokens: int, finishes: Ints, budget: int, now: int) -> int:
    """The step in which a prefill of `tokens` ends that has what step `now` leaves over to itself.

    From `now + 1` on every step takes one decode for each of `finishes` (the last step of each)
    that is not over, and up to `budget` tokens in all.
    """
    finishes = np.sort(finishes)
    horizon = max(int(finishes[-1]) - now, 0) if len(finishes) else 0
    steps = now + 1 + np.arange(horizon)
    decodes = len(finishes) - np.searchsorted(finishes, steps, side="left")
    room = np.cumsum(np.maximum(budget - decodes, 0))
    if horizon and room[-1] >= tokens:
        return now + 1 + int(np.searchsorted(room, tokens, side="left"))
    left = tokens - (int(room[-1]) if horizon else 0)
    return now + horizon + -(-left // budget)
