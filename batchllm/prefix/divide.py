"""A window divided among several engines, or a table into partitions, by what they cost.

Prompts in sorted order have everything they share with their neighbours, so each engine gets a
range of that order, and a cut costs what its two neighbours have in common: the range that begins
there computes it again. That is part of what the range costs, so a cut falls where little is shared
unless balance is worth more, and a group larger than an engine's share is cut within.

How cheap the costliest range can be is found exactly, by bisection; what things cost is a guess, so
a little of that is given up to repeat less and to have the other ranges alike. Dealing whole groups
out could repeat nothing at all, but there are only as many cuts as engines, and thousands of
prompts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.tree import Ints, PrefixTree

Floats = NDArray[np.float64]
Numbers = Ints | Floats
_BISECTIONS = 60  # to the last bit of a float, more or less
_SLACK = 0.01  # of the costliest range: what it may be dearer for the sake of less repetition


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds that things add to a run whose steps are well filled.

    `prompt_token` is one more of a prompt, without its attention, `pair` a query and a key of it,
    `output_token` one more of an answer, and `read` a token of KV that a decode reads.
    """

    prompt_token: float
    pair: float
    output_token: float
    read: float


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of items in order, [n].

    `own` is what an item costs behind the one before it, and `repeated` what it costs more as the
    first of a range: 0 for the first of all.
    """

    own: Floats
    repeated: Floats


@dataclass(frozen=True, slots=True)
class Division:
    """Range i holds the leaves `[bounds[i], bounds[i + 1])`, none where there are too few.

    `seconds` [count] is what each will take about; `repeated_tokens` are computed once more than
    if nothing were divided.
    """

    bounds: Ints
    seconds: Floats
    repeated_tokens: int


def divide_tree(tree: PrefixTree, outputs: Ints, rates: Rates, count: int) -> Division:
    """Divide the leaves, which answer with `outputs` [num_leaves] tokens, into `count` ranges."""
    shared = shared_with_previous(tree)
    costs = leaf_costs(tree.leaf_length, shared, outputs, rates)
    bounds = divide(costs, np.ones(count))
    begun = bounds[:-1][bounds[:-1] < bounds[1:]]
    return Division(bounds, range_seconds(costs, bounds), int(shared[begun[1:]].sum()))


def shared_with_previous(tree: PrefixTree) -> Ints:
    """The prefix that each leaf shares with the one before it, in tokens, [num_leaves]."""
    shared = np.zeros(tree.num_leaves, dtype=np.int64)
    nodes = zip(tree.node_leaf_begin, tree.node_leaf_end, tree.node_end, strict=True)
    for begin, end, depth in nodes:  # those within come behind, and are deeper
        shared[begin + 1 : end] = depth
    return shared


def leaf_costs(lengths: Ints, shared: Ints, outputs: Ints, rates: Rates) -> Costs:
    """What prompts of `lengths` cost in order, each sharing `shared` tokens with the one before.

    A shared prefix is charged to the first that needs it, and so is that decodes read it; it is
    read once a step for all of its readers. All int64 [n].
    """
    own = prefix_seconds(shared, lengths, outputs, rates) + answer_seconds(outputs, rates)
    return Costs(own, prefix_seconds(np.zeros_like(shared), shared, outputs, rates))


def prefix_seconds(begin: Numbers, end: Numbers, outputs: Numbers, rates: Rates) -> Floats:
    """What it costs that tokens `begin` to `end` of prompts are computed, and read by decodes."""
    pairs = (end * (end + 1) - begin * (begin + 1)) / 2
    each = rates.prompt_token + rates.read * outputs
    seconds: Floats = (end - begin) * each + pairs * rates.pair
    return seconds


def answer_seconds(outputs: Numbers, rates: Rates) -> Floats:
    """What answers of so many tokens cost, without the reading of prompts."""
    seconds: Floats = outputs * (rates.output_token + rates.read * (outputs - 1) / 2)
    return seconds


def divide(costs: Costs, shares: Floats) -> Ints:
    """Cut items into ranges of these relative sizes; none is more over its share than need be.

    Args:
        costs: of the items.
        shares: how large each range is to be, [count], positive, no one more than the one before
            it; ones for equal ranges.

    Returns:
        Bounds [count + 1]: range i holds the items `[bounds[i], bounds[i + 1])`.
    """
    num_items, count = len(costs.own), len(shares)
    assert (np.diff(shares) <= 0).all() and shares[-1] > 0, shares
    bounds = np.full(count + 1, num_items, dtype=np.int64)
    bounds[0] = 0
    if num_items == 0:
        return bounds
    line = _Line.of(costs)
    limits = line.least_limit(shares) * (1 + _SLACK) * shares
    suits = line.starts_within(limits)
    for cut in range(1, count):
        begin = bounds[cut - 1]
        places = np.arange(begin + 1, min(line.reach(begin, limits[cut - 1]), num_items - 1) + 1)
        places = places[np.unpackbits(suits[cut], count=num_items)[places] == 1]
        if len(places) == 0:  # what is left is a single range
            break
        share = shares[cut - 1] / shares[cut - 1 :].sum()
        fair = line.before[begin] + (line.before[-1] - line.before[begin]) * share
        score = costs.repeated[places] + _SLACK * np.abs(line.before[places] - fair)
        bounds[cut] = places[score.argmin()]
    return bounds


def range_seconds(costs: Costs, bounds: Ints) -> Floats:
    """What each range costs, [count]."""
    before = np.concatenate([[0.0], np.cumsum(costs.own)])
    again = np.append(costs.repeated, 0.0)[bounds[:-1]]
    again[bounds[:-1] == bounds[1:]] = 0.0
    seconds: Floats = before[bounds[1:]] - before[bounds[:-1]] + again
    return seconds


@dataclass(frozen=True, slots=True)
class _Line:
    """The items in a row: what those before each cost, [n + 1], and what each is worth as a start.

    A range `[a, b)` costs `before[b] - worth[a]`.
    """

    before: Floats
    worth: Floats

    @classmethod
    def of(cls, costs: Costs) -> "_Line":
        before = np.concatenate([[0.0], np.cumsum(costs.own)])
        return cls(before, before[:-1] - costs.repeated)

    def least_limit(self, shares: Floats) -> float:
        """What the costliest range costs at least, for its share."""
        best = _last_best(self.worth)
        total = float(self.before[-1])
        low, high = total / float(shares.sum()), total / float(shares[0])
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if self._is_possible(middle * shares, best):
                high = middle
            else:
                low = middle
        return high

    def reach(self, begin: int, limit: float) -> int:
        """How far a range from here can go."""
        return int(np.searchsorted(self.before, limit + self.worth[begin], side="right")) - 1

    def starts_within(self, limits: Floats) -> list[NDArray[np.uint8]]:
        """From where the ranges i and on get to the end, for each i, in bits; not for the first."""
        num_items = len(self.worth)
        suits = self.worth >= self.before[-1] - limits[-1]
        found = [np.packbits(suits)]
        for limit in limits[-2:0:-1].tolist():
            marks = np.where(suits, np.arange(num_items), num_items)
            ahead = np.append(np.minimum.accumulate(marks[::-1])[::-1], num_items)[1:]
            suits = suits | (self.worth >= self.before[ahead] - limit)
            found.append(np.packbits(suits))
        return [np.zeros(0, dtype=np.uint8), *found[::-1]]

    def _is_possible(self, limits: Floats, best: Ints) -> bool:
        """Whether ranges within these limits get to the end.

        Going as far as can be, then back to the best start, is as good as any other way.
        """
        begin = 0
        for limit in limits.tolist():
            end = self.reach(begin, limit)
            if end >= len(best):
                return True
            if best[end] <= begin:
                return False
            begin = int(best[end])
        return False


def _last_best(values: Floats) -> Ints:
    """Of the first i + 1 values, where the largest is, the last of equal ones, [n]."""
    largest = np.maximum.accumulate(values)
    places = np.where(values == largest, np.arange(len(values)), 0)
    return np.maximum.accumulate(places)
