"""A table divided among a cluster's workers: from counts of its sorted prompts to partitions.

Partitions are runs of the fine ranges that `tally` counted, so a cut falls where little is shared,
and each costs about its share. Costs are guesses (how long will answers be? how fast is a worker?),
so a worker gets most of its share in one large partition, where the most is shared, and the rest
lies in small ones that whoever is done first takes next: whatever was guessed wrong by less than
that is evened out.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchllm.prefix.divide import (
    Costs,
    Floats,
    Rates,
    answer_seconds,
    divide,
    prefix_seconds,
    range_seconds,
)
from batchllm.prefix.partition import Ints
from batchllm.prefix.tally import Tally

_LARGE = 0.75  # of a worker's share in its large partition
_SMALL_ONES = 5  # a worker, that have the rest
_LEAST_ROWS = 1024  # in a small one: fewer fill no steps


@dataclass(frozen=True, slots=True)
class TokenRate:
    """How many tokens keys make: `head` that all prompts begin with, and so many a byte."""

    head: float
    per_byte: float


@dataclass(frozen=True, slots=True)
class Partitions:
    """Partition i has the fine ranges `[bounds[i], bounds[i + 1])`, of consecutive prompts.

    `seconds` and `rows` [count] are what each takes about, and has. `computed_tokens` is about what
    the whole table's distinct prefixes have; `repeated_tokens` are computed once more because
    partitions part rows that share them.
    """

    bounds: Ints
    seconds: Floats
    rows: Ints
    computed_tokens: float
    repeated_tokens: float

    @property
    def count(self) -> int:
        return len(self.seconds)

    @property
    def of_range(self) -> Ints:
        """The partition of each fine range."""
        return np.repeat(np.arange(self.count), np.diff(self.bounds))


def choose_partitions(tally: Tally, tokens: TokenRate, rates: Rates, shares: Floats) -> Partitions:
    """Cut a table that was counted into partitions of these relative sizes, the largest first.

    Those that would be empty are left out.
    """
    begin = np.asarray(tokens.head + tokens.per_byte * tally.begin, dtype=np.float64)
    end = np.asarray(tokens.head + tokens.per_byte * tally.end, dtype=np.float64)
    ends = tally.count > 0
    outputs = np.full(1, np.average(tally.answer, weights=ends) if ends.any() else 0.0)
    head = prefix_seconds(np.zeros(1), np.full(1, tokens.head), outputs, rates)
    seconds = prefix_seconds(begin, end, outputs, rates)
    inner = np.where(ends, 0.0, seconds) / tally.rate
    own = np.bincount(tally.first, inner, len(tally.rows)) + _ends(tally, seconds, rates)
    all_of_it = seconds + np.where(ends, answer_seconds(tally.answer, rates), 0.0)
    again = _begun_again(tally, all_of_it / tally.rate) + head
    filled = np.flatnonzero(tally.rows)  # a partition begins where rows are
    if len(filled) == 0:
        filled = np.zeros(1, dtype=np.int64)
    own[filled[0]] += head[0]
    again[filled[0]] = 0.0
    costs = Costs(own[filled], again[filled])
    cuts = np.unique(divide(costs, shares))
    bounds = np.append(filled, len(tally.rows))[cuts]
    bounds[0] = 0
    rows = np.concatenate([[0], np.cumsum(tally.rows)])
    repeated = _begun_again(tally, (end - begin) / tally.rate) + tokens.head
    return Partitions(
        bounds,
        range_seconds(costs, cuts),
        np.diff(rows[bounds]),
        float((end - begin).sum() / tally.rate + tokens.head),
        float(repeated[bounds[1:-1]].sum()),
    )


def graded_shares(workers: int, num_rows: int) -> Floats:
    """Relative sizes of partitions for so many workers: the large ones, then those to even out.

    Where the small ones would hardly have rows, each worker gets one partition.
    """
    small = (1 - _LARGE) / _SMALL_ONES
    if workers == 1 or small * num_rows / workers < _LEAST_ROWS:
        return np.ones(workers)
    return np.concatenate([np.full(workers, _LARGE), np.full(workers * _SMALL_ONES, small)])


def makespan(seconds: Sequence[float], workers: int) -> float:
    """When the last is done, if whoever is free takes the next."""
    free = [0.0] * workers
    for one in seconds:
        heapq.heapreplace(free, free[0] + one)
    return max(free)


def _ends(tally: Tally, seconds: Floats, rates: Rates) -> Floats:
    """What the prompts of each range take from their last chunk on, answers included, [num_ranges].

    How many rows a range has is known exactly; the sample says how many of them are distinct, and
    what those take.
    """
    size = len(tally.rows)
    ends = np.where(tally.count > 0, seconds + answer_seconds(tally.answer, rates), 0.0)
    sampled = _spread(tally, tally.count / (tally.last - tally.first + 1))
    mean = ends.sum() / max(sampled.sum(), 1)
    found = np.bincount(tally.first, ends, size)
    each = np.divide(found, sampled, out=np.full(size, mean), where=sampled > 0)
    return np.asarray(tally.rows * each, dtype=np.float64)


def _begun_again(tally: Tally, weights: Floats) -> Floats:
    """Of each range, what prefixes weigh that it shares with the one before it, [num_ranges]."""
    return _spread(tally, weights) - np.bincount(tally.first, weights, len(tally.rows))


def _spread(tally: Tally, weights: Floats) -> Floats:
    """Of each range, what the prefixes weigh that it has, [num_ranges]."""
    size = len(tally.rows) + 1
    opened = np.bincount(tally.first, weights, size)
    closed = np.bincount(tally.last + 1, weights, size)
    return np.asarray(np.cumsum(opened - closed)[:-1], dtype=np.float64)
