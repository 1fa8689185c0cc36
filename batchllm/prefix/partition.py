"""From a sample of prompts to ranges of prompts that are cut where cutting costs least.

Prompts in sorted order have everything they share with their neighbours, so a range of that order
shares nearly all that the whole does: of every cut, only the prefix that its two neighbours have in
common is computed once more.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.sorting import common_prefix

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
# Prompts as bytes that compare like them: UTF-8, or big-endian token ids.
Keys = Sequence[bytes]

_SLACK = 0.15  # of a range: how far a cut may move to where it costs less


@dataclass(frozen=True, slots=True)
class KeyRanges:
    """Ranges of keys. Range i holds the keys from `bounds[i - 1]` on and below `bounds[i]`.

    Where bounds are equal, the keys that equal them are more than one range may hold; they are
    dealt out over all ranges that end or begin there.
    """

    bounds: Keys

    @property
    def count(self) -> int:
        return len(self.bounds) + 1

    def assign(self, keys: Keys, numbers: Ints) -> Ints:
        """The range of each key; `numbers` [num_keys] deal out equal ones."""
        ranges = np.empty(len(keys), dtype=np.int64)
        for i, key in enumerate(keys):
            end = bisect_right(self.bounds, key)
            if end >= 2 and self.bounds[end - 2] == key:
                begin = bisect_left(self.bounds, key)
                end = begin + int(numbers[i]) % (end - begin + 1)
            ranges[i] = end
        return ranges


def choose_ranges(sample: Keys, weights: Floats, count: int) -> KeyRanges:
    """Cut keys into `count` ranges of about equal weight.

    Args:
        sample: keys that stand for all of them.
        weights: what each of them weighs, [num_sample].
        count: how many ranges.

    Every cut may move a little to where neighbours have least in common.
    """
    order = sorted(range(len(sample)), key=sample.__getitem__)
    keys = [sample[i] for i in order]
    before = np.concatenate([[0.0], np.cumsum(weights[order])])  # weight of the keys before each
    bounds: list[bytes] = []
    step = before[-1] / count
    for cut in range(1, count):
        begin = int(np.searchsorted(before, (cut - _SLACK) * step, "left"))
        end = int(np.searchsorted(before, (cut + _SLACK) * step, "right"))
        nearest = int(np.clip(np.searchsorted(before, cut * step), 1, len(keys) - 1))
        places = [nearest, *range(max(begin, 1), min(end, len(keys)))]
        place = min(places, key=lambda i: (common_prefix(keys[i - 1], keys[i]), abs(i - nearest)))
        # The shortest key that parts them, so that what was not sampled goes to its own side.
        bounds.append(keys[place][: common_prefix(keys[place - 1], keys[place]) + 1])
    return KeyRanges(bounds)
