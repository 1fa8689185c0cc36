"""A window divided among several engines, so that all are done at about the same time.

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
    bounds = divide(costs, count)
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

    def tokens(begin: Ints, end: Ints) -> Floats:
        """Computed, and read by every decode."""
        pairs = (end * (end + 1) - begin * (begin + 1)) // 2
        each = rates.prompt_token + rates.read * outputs
        seconds: Floats = (end - begin) * each + pairs * rates.pair
        return seconds

    answers = outputs * (rates.output_token + rates.read * (outputs - 1) / 2)
    return Costs(tokens(shared, lengths) + answers, tokens(np.zeros_like(shared), shared))


def divide(costs: Costs, count: int) -> Ints:
    """Cut items into `count` ranges, of which the costliest is nearly as cheap as can be.

    Returns:
        Bounds [count + 1]: range i holds the items `[bounds[i], bounds[i + 1])`.
    """
    num_items = len(costs.own)
    bounds = np.full(count + 1, num_items, dtype=np.int64)
    bounds[0] = 0
    if num_items == 0:
        return bounds
    line = _Line.of(costs)
    limit = line.least_limit(count) * (1 + _SLACK)
    suits = line.starts_within(limit, count)
    for cut in range(1, count):
        begin, left = bounds[cut - 1], count - cut  # `left` ranges are behind the cut
        places = np.arange(begin + 1, min(line.reach(begin, limit), num_items - 1) + 1)
        places = places[suits[left - 1][places]]
        if len(places) == 0:  # what is left is a single range
            break
        fair = line.before[begin] + (line.before[-1] - line.before[begin]) / (left + 1)
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

    def least_limit(self, count: int) -> float:
        """What the costliest of `count` ranges costs at least."""
        best = _last_best(self.worth)
        high = float(self.before[-1])
        low = high / count
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if self._is_possible(middle, best, count):
                high = middle
            else:
                low = middle
        return high

    def reach(self, begin: int, limit: float) -> int:
        """How far a range from here can go."""
        return int(np.searchsorted(self.before, limit + self.worth[begin], side="right")) - 1

    def starts_within(self, limit: float, count: int) -> list[NDArray[np.bool_]]:
        """From where one range of at most `limit` gets to the end, from where two do, and so on."""
        num_items = len(self.worth)
        suits = [self.worth >= self.before[-1] - limit]
        for _ in range(count - 2):
            marks = np.where(suits[-1], np.arange(num_items), num_items)
            ahead = np.append(np.minimum.accumulate(marks[::-1])[::-1], num_items)[1:]
            suits.append(suits[-1] | (self.worth >= self.before[ahead] - limit))
        return suits

    def _is_possible(self, limit: float, best: Ints, count: int) -> bool:
        """Whether `count` ranges of at most `limit` get to the end.

        Going as far as can be, then back to the best start, is as good as any other way.
        """
        begin = 0
        for _ in range(count):
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
