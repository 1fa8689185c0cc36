"""Ranges of keys: every key in one, neighbours together, balanced, cut where it costs least."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm.prefix.partition import KeyRanges, choose_ranges
from batchllm.prefix.sorting import common_prefix

KEYS = st.lists(st.binary(max_size=4).map(lambda b: bytes(c % 3 for c in b)), min_size=1)


@given(KEYS, KEYS, st.integers(1, 6))
def test_ranges_follow_each_other_in_the_order_of_keys(sample, keys, count):
    ranges = choose_ranges(sample, np.ones(len(sample)), count)
    assert ranges.count == count
    placed = ranges.assign(keys, np.arange(len(keys)))
    assert placed.min() >= 0 and placed.max() < count
    for one, key in zip(placed.tolist(), keys, strict=True):
        for other, after in zip(placed.tolist(), keys, strict=True):
            assert one <= other or key >= after


@given(st.binary(max_size=20), st.binary(max_size=20))
def test_the_common_prefix_is_the_longest(left, right):
    agree = [left[:n] == right[:n] for n in range(min(len(left), len(right)) + 1)]
    assert common_prefix(left, right) == sum(agree) - 1


def test_ranges_are_balanced_by_weight():
    rng = np.random.default_rng(0)
    keys = [rng.bytes(8) for _ in range(4000)]
    weights = np.where([key < b"\x80" for key in keys], 3.0, 1.0)
    placed = choose_ranges(keys, weights, 8).assign(keys, np.arange(4000))
    shares = np.bincount(placed, weights=weights) / weights.sum() * 8
    assert shares.min() > 0.7 and shares.max() < 1.3


def test_a_cut_moves_to_where_neighbours_have_least_in_common():
    groups = [f"{group:02d}" * 20 for group in range(10)]
    keys = [f"{group}{i:02d}".encode() for group in groups for i in range(10)]
    ranges = choose_ranges(keys, np.ones(100), 3)  # 33 and 67 are within groups
    placed = ranges.assign(keys, np.arange(100))
    assert np.bincount(placed).tolist() == [30, 40, 30]


def test_what_one_range_cannot_hold_is_dealt_out():
    keys = [b"a"] * 10 + [b"same"] * 80 + [b"z"] * 10
    placed = choose_ranges(keys, np.ones(100), 5).assign(keys, np.arange(100))
    assert np.bincount(placed, minlength=5).max() <= 40
    assert placed[0] == 0 and placed[-1] == 4


@pytest.mark.parametrize("bounds", [[], [b"b"], [b"b", b"b", b"b"], [b"a", b"b", b"b", b"c"]])
def test_a_key_goes_where_its_bounds_say(bounds):
    ranges = KeyRanges(bounds)
    for number in range(5):
        keys = [b"", b"a", b"a!", b"b", b"b!", b"c", b"d"]
        for key, place in zip(keys, ranges.assign(keys, np.full(7, number)), strict=True):
            assert place == 0 or bounds[place - 1] <= key
            assert place == len(bounds) or key <= bounds[place]
            assert place == len(bounds) or key < bounds[place] or bounds.count(key) > 1
