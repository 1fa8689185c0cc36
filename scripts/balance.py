"""How evenly a table of a hundred million rows is divided among a thousand workers, simulated.

The table is made of groups of rows that share a prefix, of very unequal sizes; it is never written
out: what the passes over a real one would find is drawn from the same numbers, and goes through the
code that a real run goes through (`choose_ranges`, `choose_partitions`). What partitions then
really take is added up row by row, and handed out to workers as they become free.

Usage: python scripts/balance.py [--rows 100000000] [--workers 1000] [--seed 0]
"""

import argparse
import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from batchllm.integrations.survey import sample_size
from batchllm.models.shapes import get_config
from batchllm.prefix.balance import TokenRate, choose_partitions, graded_shares, makespan
from batchllm.prefix.divide import Floats, Rates, answer_seconds, prefix_seconds
from batchllm.prefix.partition import Ints, choose_ranges
from batchllm.prefix.tally import CHUNK, Tally
from batchllm.simulate.cost import CostModel
from batchllm.simulate.machine import get_machine
from batchllm.simulate.shape import shape_of

BYTES_PER_TOKEN = 4
PREFIXES = 1 << 20  # counted, as a run does
MAX_TOKENS = 64
KEY = np.dtype(">u8")  # a row's number, in sorted order, is key enough for it


@dataclass(frozen=True)
class Table:
    """Groups of rows in sorted order: their first rows, [n + 1], and their prefixes' tokens, [n].

    `private` and `answer` are tokens of each row, behind the prefix and of its answer.
    """

    first: Ints
    prefix: Ints
    private: np.ndarray
    answer: np.ndarray


def make_table(rng: np.random.Generator, num_rows: int, answers: str) -> Table:
    """Groups of 1 to 100,000 rows; towards the end, prefixes become three times longer."""
    sizes = np.empty(0, dtype=np.int64)
    while sizes.sum() < num_rows:
        more = np.minimum(np.ceil(8 * rng.pareto(1.1, num_rows // 50) + 1e-9), 100_000)
        sizes = np.concatenate([sizes, more.astype(np.int64)])
    first = np.concatenate([[0], np.cumsum(sizes)])
    groups = int(np.searchsorted(first, num_rows))
    first = np.append(first[:groups], num_rows)
    where = np.linspace(1, 3, groups)
    prefix = (rng.lognormal(6, 0.8, groups) * where).astype(np.int64) + 1
    private = rng.integers(10, 120, num_rows, dtype=np.int16)
    if answers == "as long as allowed":
        answer = np.full(num_rows, MAX_TOKENS, dtype=np.int16)
    else:  # each group has its own kind of answers, of which nobody knows beforehand
        means = np.repeat(rng.uniform(4, MAX_TOKENS, groups), np.diff(first))
        answer = np.clip(rng.exponential(means), 1, MAX_TOKENS).astype(np.int16)
    if answers == "longer at the end":
        answer = (answer * np.linspace(0.5, 1, num_rows)).clip(1).astype(np.int16)
    return Table(first, prefix, private, answer)


def fine_bounds(rng: np.random.Generator, table: Table, num_partitions: int, workers: int) -> Ints:
    """Rows at which the fine ranges begin, by the code that a driver runs on sampled keys."""
    num_rows = len(table.private)
    size = sample_size(1, workers, 65_536)
    sample = np.unique(rng.integers(0, num_rows, size))
    groups = np.searchsorted(table.first, sample, "right") - 1
    packed = np.stack([groups, sample], axis=1).astype(KEY).tobytes()
    keys = [packed[i : i + 16] for i in range(0, len(packed), 16)]
    ranges = choose_ranges(keys, np.full(len(keys), num_rows / len(keys)), 16 * num_partitions)
    bounds = np.array([list(key.ljust(16, b"\0")) for key in ranges.bounds], dtype=np.uint8)
    group = bounds[:, :8].copy().view(KEY).ravel().astype(np.int64)
    row = bounds[:, 8:].copy().view(KEY).ravel().astype(np.int64)
    # A bound within a group names a row, one between groups the first row of the next.
    starts = np.maximum(table.first[np.minimum(group, len(table.first) - 1)], row)
    return np.concatenate([[0], starts, [num_rows]])


def draw_tally(rng: np.random.Generator, table: Table, bounds: Ints) -> Tally:
    """What counting the whole table finds, of which a sample of prefixes is kept."""
    num_rows = len(table.private)
    in_prefix = table.prefix * BYTES_PER_TOKEN // CHUNK
    in_row = table.private.astype(np.int64) * BYTES_PER_TOKEN // CHUNK
    rate = min(1.0, PREFIXES / float(in_prefix.sum() + in_row.sum() + num_rows))

    def ranges_of(rows: Ints) -> Ints:
        return np.searchsorted(bounds, rows, "right") - 1

    shared = np.repeat(np.arange(len(in_prefix)), rng.binomial(in_prefix, rate))
    inner = np.repeat(np.arange(num_rows), rng.binomial(in_row, rate))
    leaf = np.flatnonzero(rng.random(num_rows) < rate)
    group_of = np.searchsorted(table.first, np.concatenate([inner, leaf]), "right") - 1
    heads = table.prefix[group_of] * BYTES_PER_TOKEN
    inner_begin = heads[: len(inner)] + CHUNK * rng.integers(0, in_row[inner])
    leaf_end = heads[len(inner) :] + table.private[leaf].astype(np.int64) * BYTES_PER_TOKEN
    shared_begin = CHUNK * rng.integers(0, in_prefix[shared])
    own = np.concatenate([inner, leaf])
    none = np.zeros(len(shared) + len(inner), dtype=np.int64)
    return Tally(
        rate=rate,
        rows=np.diff(bounds),
        hashes=np.arange(len(shared) + len(own), dtype=np.uint64),
        begin=np.concatenate([shared_begin, inner_begin, leaf_end // CHUNK * CHUNK]),
        end=np.concatenate([shared_begin + CHUNK, inner_begin + CHUNK, leaf_end]),
        first=ranges_of(np.concatenate([table.first[shared], own])),
        last=ranges_of(np.concatenate([table.first[shared + 1] - 1, own])),
        count=np.concatenate([none, np.ones(len(leaf), dtype=np.int64)]),
        answer=np.concatenate([none, np.full(len(leaf), MAX_TOKENS)]),
    )


def true_seconds(table: Table, starts: Ints, rates: Rates) -> tuple[Floats, float]:
    """What partitions that begin at these rows take; and what one engine would, in all."""
    prefix = table.prefix.astype(float)
    head = prefix_seconds(np.zeros(len(prefix)), prefix, np.full(1, 32.0), rates)
    seconds = np.zeros(len(starts) - 1)
    for i, (begin, end) in enumerate(pairwise(starts.tolist())):
        groups = slice(
            np.searchsorted(table.first, begin, "right") - 1, np.searchsorted(table.first, end)
        )
        heads = np.repeat(
            prefix[groups],
            np.diff(np.clip(table.first[groups.start : groups.stop + 1], begin, end)),
        )
        private = table.private[begin:end]
        answer = table.answer[begin:end].astype(float)
        own = prefix_seconds(heads, heads + private, answer, rates) + answer_seconds(answer, rates)
        seconds[i] = own.sum() + head[groups].sum()
    cut = starts[1:-1][~np.isin(starts[1:-1], table.first)]
    again = head[np.searchsorted(table.first, cut, "right") - 1].sum()
    return seconds, seconds.sum() - again


def main() -> None:
    """Print a table, a row for what is known of the answers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    costs = CostModel(get_machine("h100"), shape_of(get_config("llama-3.1-8b"), "bfloat16"))
    rates = costs.rates(8192, 2048)
    print(
        "| answers | partitions | dearest over mean, large ones | repeated | makespan / ideal | "
        "equal rows | planned in |\n|---|---|---|---|---|---|---|"
    )
    for answers in ("as long as allowed", "unknown", "longer at the end"):
        rng = np.random.default_rng(args.seed)
        table = make_table(rng, args.rows, answers)
        shares = graded_shares(args.workers, args.rows)
        begun = time.perf_counter()
        bounds = fine_bounds(rng, table, len(shares), args.workers)
        tally = draw_tally(rng, table, bounds)
        tokens = TokenRate(0.0, 1 / BYTES_PER_TOKEN)
        planned = choose_partitions(tally, tokens, rates, shares)
        took = time.perf_counter() - begun
        seconds, alone = true_seconds(table, bounds[planned.bounds], rates)
        large = seconds[: args.workers]
        ideal = alone / args.workers
        by_rows = np.linspace(0, args.rows, args.workers + 1).astype(np.int64)
        naive, _ = true_seconds(table, by_rows, rates)
        last = makespan(seconds.tolist(), args.workers)
        print(
            f"| {answers} | {planned.count:,} | {large.max() / large.mean():.3f} | "
            f"{seconds.sum() / alone - 1:.3%} | {last / ideal:.3f} | "
            f"{naive.max() / ideal:.3f} | {took:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
