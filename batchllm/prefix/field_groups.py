"""Groups of rows that share a field's value, taken greedily."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.field_rules import OTHER
from batchllm.prefix.fields import Ints

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows with one value of a field; or if `value` is `OTHER`, each with a value of its own.

    `place` is the field's among those given, `rows` are places among the rows given.
    """

    place: int
    value: int
    rows: Ints


def greedy_groups(codes: Ints, lengths: Floats, scale: float = 1.0) -> Iterator[Group]:
    """Take the group that saves most a row if it comes first, until none saves anything.

    A row is taken once, and groups shrink as others take their rows.

    Where these rows are a sample, a value that only one of them has may still be a group in the
    table. Those of a field are taken together, and expected to be as large as Good and Turing say:
    as values seen twice are to values seen once, so are repeats to new values in as many rows more.

    Args:
        codes: values, [num_fields, num_rows].
        lengths: what of a row's text its groups share, [num_fields, num_rows].
        scale: how many rows of the table there are to each of these, at least 1.
    """
    if codes.size == 0:
        return
    num_fields, num_rows = codes.shape
    codes = np.array([np.where(alone(field), OTHER, field) for field in codes])
    # One numbering of the groups of all fields.
    width = int(codes.max()) + 2
    numbers = (codes - OTHER) + width * np.arange(num_fields)[:, None]
    keys, group_of, sizes = np.unique(numbers.ravel(), return_inverse=True, return_counts=True)
    places, values = keys // width, keys % width + OTHER
    shared = np.bincount(group_of, weights=lengths.ravel()) / sizes
    entries = np.argsort(group_of, kind="stable")  # into the flattened codes, group by group
    begins = np.cumsum(sizes) - sizes
    members = [entries[b : b + s] % num_rows for b, s in zip(begins, sizes, strict=True)]
    expected = [repeats_of_new_values(field) * (scale - 1) for field in codes]
    group_of = group_of.reshape(codes.shape)
    taken = np.zeros(num_rows, dtype=bool)

    def saving(group: int) -> float:
        """Characters a row of the group saves on average, counting the one that must compute."""
        if values[group] == OTHER:
            others = expected[places[group]] if sizes[group] else 0.0
        else:
            others = sizes[group] * scale - 1 if sizes[group] > 1 else 0.0
        return float(shared[group] * others / (others + 1))

    heap = [(-gain, group) for group in range(len(keys)) if (gain := saving(group)) > 0]
    heapq.heapify(heap)
    while heap:
        gain, group = heapq.heappop(heap)
        now = -saving(group)
        if now > gain:  # it has lost rows since it was put there
            if now < 0:
                heapq.heappush(heap, (now, group))
            continue
        rows = members[group][~taken[members[group]]]
        taken[rows] = True
        np.subtract.at(sizes, group_of[:, rows].ravel(), 1)
        yield Group(int(places[group]), int(values[group]), rows)


def alone(codes: Ints) -> NDArray[np.bool_]:
    """Which rows have a value that no other row has, [num_rows]."""
    _, value, counts = np.unique(codes, return_inverse=True, return_counts=True)
    return np.asarray(counts[value] == 1)


def repeats_of_new_values(codes: Ints) -> float:
    """In as many rows more, how many would have the value of a row that has it alone here.

    Good and Turing's estimate: twice the number of values seen twice, by that of those seen once,
    which are `OTHER` here.
    """
    once = np.count_nonzero(codes == OTHER)
    twice = np.count_nonzero(np.unique(codes[codes != OTHER], return_counts=True)[1] == 2)
    return 2 * twice / once if once else 0.0
