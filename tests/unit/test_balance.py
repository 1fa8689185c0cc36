"""From keys to partitions: counts are right, merge, and make partitions that cost alike."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchllm.prefix.balance import (
    TokenRate,
    choose_partitions,
    graded_shares,
    makespan,
)
from batchllm.prefix.divide import Rates
from batchllm.prefix.partition import KeyRanges, choose_ranges
from batchllm.prefix.tally import CHUNK, Counter, Tally

PREFILL = Rates(prompt_token=1.0, pair=0.0, output_token=0.0, read=0.0)
ANSWERS = Rates(prompt_token=0.0, pair=0.0, output_token=1.0, read=0.0)
BYTES = TokenRate(head=0.0, per_byte=1.0)
KEYS = st.lists(
    st.lists(st.sampled_from([b"a" * CHUNK, b"b" * CHUNK, b"c" * 40]), max_size=5).map(b"".join),
    min_size=1,
    max_size=20,
)
BOUNDS = st.lists(
    st.lists(st.sampled_from([b"a" * CHUNK, b"b" * 30, b"c"]), max_size=3).map(b"".join),
    max_size=4,
).map(lambda bounds: KeyRanges(sorted(bounds)))


def count(keys, ranges, rate=1.0, answers=None, first=0):
    counter = Counter(ranges, rate)
    answers = np.ones(len(keys), int) if answers is None else answers
    counter.add(keys, first + np.arange(len(keys)), answers)
    return counter.tally()


def prefixes(key):
    """What a tally counts of a key: its prefixes up to each chunk's end, and the whole."""
    return [(key[:end], False) for end in range(CHUNK, len(key) + 1, CHUNK)] + [(key, True)]


def columns(tally):
    names = ("end", "first", "last", "count", "answer")
    return list(zip(*(getattr(tally, name).tolist() for name in names), strict=True))


@given(KEYS, BOUNDS)
def test_every_prefix_is_counted_once_where_it_is(keys, ranges):
    places = ranges.assign(keys, np.arange(len(keys)))
    seen = {}
    for key, place in zip(keys, places.tolist(), strict=True):
        for prefix, is_whole in prefixes(key):
            seen.setdefault((prefix, is_whole), []).append(place)
    expected = sorted(
        (len(prefix), min(found), max(found), *((len(found), 1) if is_whole else (0, 0)))
        for (prefix, is_whole), found in seen.items()
    )
    tally = count(keys, ranges)
    assert sorted(columns(tally)) == expected
    assert tally.rows.tolist() == np.bincount(places, minlength=ranges.count).tolist()
    assert (tally.end - tally.begin).sum() == num_prefixes(keys)


@given(KEYS, BOUNDS, st.data())
def test_counts_of_parts_merge_into_those_of_the_whole(keys, ranges, data):
    rate = data.draw(st.sampled_from([1.0, 0.5]))
    cut = data.draw(st.integers(0, len(keys)))
    parts = [count(keys[:cut], ranges, rate), count(keys[cut:], ranges, rate, first=cut)]
    counter = Counter(ranges, rate)
    counter.add(keys[:cut], np.arange(cut), np.ones(cut, int))
    counter.add(keys[cut:], np.arange(cut, len(keys)), np.ones(len(keys) - cut, int))
    whole, merged, added = count(keys, ranges, rate), Tally.merge(parts), counter.tally()
    by_hash = dict(zip(whole.hashes.tolist(), columns(whole), strict=True))
    begin = dict(zip(whole.hashes.tolist(), whole.begin.tolist(), strict=True))
    for other in (merged, added):
        assert dict(zip(other.hashes.tolist(), columns(other), strict=True)) == by_hash
        assert other.rows.tolist() == whole.rows.tolist()
        for number, end, at in zip(other.hashes.tolist(), other.end, other.begin, strict=True):
            assert (
                end - CHUNK <= at <= begin[number]
            )  # fewer neighbours show less of what is shared


@example([b"b" * CHUNK, b"b" * 2 * CHUNK], KeyRanges([b"b" * 90, b"b" * 96]), 3)  # an empty range
@given(KEYS, BOUNDS, st.integers(1, 4))
def test_costs_and_what_cuts_repeat_are_those_of_the_distinct_prefixes(keys, ranges, workers):
    partitions = choose_partitions(count(keys, ranges), BYTES, PREFILL, np.ones(workers))
    assert partitions.bounds[0] == 0 and partitions.bounds[-1] == ranges.count
    assert partitions.rows.sum() == len(keys) and (partitions.rows > 0).all()
    of_key = partitions.of_range[ranges.assign(keys, np.arange(len(keys)))].tolist()
    apart = sum(
        num_prefixes([key for key, at in zip(keys, of_key, strict=True) if at == number])
        for number in range(partitions.count)
    )
    assert partitions.computed_tokens == pytest.approx(num_prefixes(keys))
    missing = apart - num_prefixes(keys) - partitions.repeated_tokens
    assert -1e-6 <= missing <= CHUNK * (partitions.count - 1)


def num_prefixes(keys):
    return len({key[:end] for key in keys for end in range(1, len(key) + 1)})


def table(rng, num_groups):
    """Groups of very unequal size, with longer and longer heads: (keys, answer lengths)."""
    keys, answers = [], []
    for group in range(num_groups):
        head = rng.bytes(int(1 + group * 20 // num_groups) * CHUNK)
        size = int(rng.pareto(1.1) * 4) + 1
        length = int(1 + 40 * group // num_groups)
        for _ in range(min(size, 2000)):
            keys.append(b"%06d" % group + head + rng.bytes(int(rng.integers(8, 200))))
            answers.append(length)
    order = rng.permutation(len(keys))
    return [keys[i] for i in order], np.array(answers)[order]


def test_partitions_of_an_uneven_table_cost_alike_though_only_a_sample_was_counted():
    keys, answers = table(np.random.default_rng(0), 1500)
    rates = Rates(prompt_token=1.0, pair=0.001, output_token=10.0, read=0.0)
    sample = keys[::8]
    ranges = choose_ranges(sample, np.ones(len(sample)), 400)
    exact = count(keys, ranges, answers=answers)
    rough = count(keys, ranges, 0.1, answers=answers)
    shares = graded_shares(4, 10**6)
    assert len(shares) == 4 + 4 * 5
    chosen = choose_partitions(rough, BYTES, rates, shares)
    assert len(rough.hashes) < 0.12 * len(exact.hashes)
    # What the chosen ones really cost, by everything there is.
    true = choose_partitions(exact, BYTES, rates, np.ones(1))
    costs = [
        choose_partitions(part, BYTES, rates, np.ones(1)).seconds[0]
        for part in parts_of(keys, answers, ranges, chosen)
    ]
    assert sum(costs) <= 1.02 * true.seconds[0]
    assert makespan(costs, 4) <= 1.05 * true.seconds[0] / 4
    by_rows = np.array_split(np.argsort(np.array(keys, dtype=object)), 4)
    uneven = [
        choose_partitions(
            count([keys[i] for i in part], ranges, answers=answers[part]), BYTES, rates, np.ones(1)
        ).seconds[0]
        for part in by_rows
    ]
    assert makespan(uneven, 4) > 1.1 * true.seconds[0] / 4  # by rows, it would not be so


def parts_of(keys, answers, ranges, chosen):
    of_key = chosen.of_range[ranges.assign(keys, np.arange(len(keys)))]
    for part in range(chosen.count):
        mine = np.flatnonzero(of_key == part)
        yield count([keys[i] for i in mine], ranges, answers=answers[mine])


def test_answers_and_rows_are_counted_exactly_where_nothing_is_shared():
    rng = np.random.default_rng(1)
    keys = [rng.bytes(20) for _ in range(2000)]
    ranges = choose_ranges(keys[::20], np.ones(100), 10)
    tally = count(keys, ranges, 0.2, answers=np.full(2000, 7))
    partitions = choose_partitions(tally, BYTES, ANSWERS, np.ones(10))
    assert partitions.seconds == pytest.approx(7.0 * partitions.rows)


def test_duplicates_are_answered_once_but_in_every_partition():
    keys = [b"x" * 70] * 90 + [b"y"] * 10
    ranges = KeyRanges([b"x" * 70, b"x" * 70, b"y"])
    tally = count(keys, ranges, answers=np.full(100, 5))
    assert (tally.rows > 0).sum() > 2
    whole = choose_partitions(tally, BYTES, ANSWERS, np.ones(1))
    assert whole.seconds == pytest.approx([10.0]) and whole.repeated_tokens == 0


def test_few_rows_make_one_partition_a_worker():
    assert graded_shares(4, 1000).tolist() == [1.0] * 4
    assert graded_shares(1, 10**9).tolist() == [1.0]
    shares = graded_shares(3, 10**6)
    assert shares.sum() == pytest.approx(3) and (np.diff(shares) <= 0).all()


def test_makespan_is_that_of_whoever_is_free_taking_the_next():
    assert makespan([3.0, 1.0, 1.0, 1.0], 2) == 3.0
    assert makespan([1.0, 1.0, 3.0], 2) == 4.0
    assert makespan([], 2) == 0.0


def test_an_empty_table_is_one_empty_partition():
    tally = count([], KeyRanges([]))
    partitions = choose_partitions(tally, BYTES, PREFILL, np.ones(3))
    assert partitions.rows.tolist() == [0] and partitions.computed_tokens == 0
