"""What each range of a table's sorted prompts would cost, counted in one pass in any order.

A prefix that rows share costs once, so it does not do to add up rows: prefixes have to be counted
apart. Prompts are cut into chunks, and what a prompt has up to a chunk's end is hashed: equal hash,
equal prefix, wherever in the table it comes up. Of the hashes only those are kept that are small
enough: a sample of *prefixes*, each with the first and the last range that has it. Whoever counts
elsewhere keeps the same ones, so counts can be merged, and what the sample weighs over its rate is
without bias what all prefixes weigh, shared by two rows or by all of them. A sample of rows could
not tell: of a hundred rows under one document it has one.

Where a shared prefix ends within a chunk, the chunk would be counted for each of those that go on
differently, so neighbours of a batch are compared to the byte, and what a prompt has in common with
the one before it is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.partition import Ints, KeyRanges, Keys
from batchllm.prefix.sorting import common_prefix

CHUNK = 64  # bytes of a key: about 16 tokens
_HASH_BYTES = 8
_HASHES = 1 << (8 * _HASH_BYTES)


@dataclass(frozen=True, slots=True)
class Tally:
    """Prompts counted by range.

    `rows` [num_ranges] are how many fall into each. Of the sampled prefixes, [n] each: `hashes`
    says which; the bytes from `begin` to `end` of its prompts' keys are its own; rows from the
    range `first` to the range `last` have it; and of the prompt that ends there, if one does,
    `count` is how many rows have it, and `answer` how many tokens its answer has.
    """

    rate: float
    rows: Ints
    hashes: NDArray[np.uint64]
    begin: Ints
    end: Ints
    first: Ints
    last: Ints
    count: Ints
    answer: Ints

    @classmethod
    def merge(cls, tallies: Sequence["Tally"]) -> "Tally":
        """Of all the rows that were counted apart; at least one tally, all of one rate."""
        assert len({tally.rate for tally in tallies}) == 1
        hashes = np.concatenate([tally.hashes for tally in tallies])
        _, one, which = np.unique(hashes, return_index=True, return_inverse=True)
        order = np.argsort(which, kind="stable")
        starts = np.searchsorted(which[order], np.arange(len(one)))

        def joined(name: str) -> Ints:
            values: Ints = np.concatenate([getattr(tally, name) for tally in tallies])
            return values

        def reduced(ufunc: np.ufunc, name: str) -> Ints:
            found: Ints = ufunc.reduceat(joined(name)[order], starts) if len(one) else joined(name)
            return found

        return cls(
            rate=tallies[0].rate,
            rows=np.sum([tally.rows for tally in tallies], axis=0),
            hashes=hashes[one],
            begin=reduced(np.maximum, "begin"),
            end=joined("end")[one],
            first=reduced(np.minimum, "first"),
            last=reduced(np.maximum, "last"),
            count=reduced(np.add, "count"),
            answer=reduced(np.maximum, "answer"),
        )


@dataclass(slots=True)
class _Rows:
    """Where rows lie that have something in common, how many end there and how, as in `Tally`."""

    first: int
    last: int
    count: int = 0
    answer: int = 0

    def add(self, other: "_Rows") -> None:
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        self.count += other.count
        self.answer = max(self.answer, other.answer)


@dataclass(slots=True)
class _Prefix:
    """A sampled prefix, as in `Tally`."""

    begin: int
    end: int
    rows: _Rows


class Counter:
    """Counts prompts, a batch at a time.

    Args:
        ranges: where each belongs.
        rate: which share of the prefixes to keep, above 0 and at most 1.
    """

    def __init__(self, ranges: KeyRanges, rate: float) -> None:
        self._ranges = ranges
        self._rate = rate
        self._below = int(rate * _HASHES)
        self._rows: Ints = np.zeros(ranges.count, dtype=np.int64)
        self._kept: dict[int, _Prefix] = {}

    def add(self, keys: Keys, numbers: Ints, answers: Ints) -> None:
        """Count rows: their keys, their numbers in the table, and how long their answers are."""
        places = self._ranges.assign(keys, numbers)
        self._rows += np.bincount(places, minlength=self._ranges.count)
        prompts: dict[bytes, _Rows] = {}
        for key, place, answer in zip(keys, places.tolist(), answers.tolist(), strict=True):
            row = _Rows(place, place, 1, answer)
            if (known := prompts.get(key)) is None:
                prompts[key] = row
            else:
                known.add(row)
        self._walk(prompts)

    def tally(self) -> Tally:
        """What was counted so far."""
        kept = list(self._kept.values())
        rows = [prefix.rows for prefix in kept]

        def column(of: Sequence[object], name: str) -> Ints:
            return np.array([getattr(one, name) for one in of], dtype=np.int64)

        return Tally(
            rate=self._rate,
            rows=self._rows.copy(),
            hashes=np.fromiter(self._kept, dtype=np.uint64, count=len(kept)),
            begin=column(kept, "begin"),
            end=column(kept, "end"),
            first=column(rows, "first"),
            last=column(rows, "last"),
            count=column(rows, "count"),
            answer=column(rows, "answer"),
        )

    def _walk(self, prompts: dict[bytes, _Rows]) -> None:
        """Go through prompts in order, so that what neighbours share is hashed once."""
        keys = sorted(prompts)
        common = [0, *(common_prefix(left, right) for left, right in pairwise(keys))]
        chain = [b""]  # the hash up to each chunk's end
        sampled: list[tuple[int, _Rows]] = []  # of the chain: which chunk, and who has it
        last = 0
        for key, shared in zip(keys, common, strict=False):
            rows = prompts[key]
            same = shared // CHUNK
            while sampled and sampled[-1][0] >= same:
                sampled.pop()[1].add(_Rows(last, last))
            del chain[same + 1 :]
            for chunk in range(same, len(key) // CHUNK):
                begin, end = chunk * CHUNK, (chunk + 1) * CHUNK
                chain.append(_hash(chain[-1] + key[begin:end]))
                here = _Rows(rows.first, rows.last)
                kept = self._keep(chain[-1], max(begin, shared), end, here)
                if kept is not None:
                    sampled.append((chunk, kept))
            begin, end = len(key) // CHUNK * CHUNK, len(key)
            whole = _hash(b"end" + chain[-1] + key[begin:])
            self._keep(whole, max(begin, shared), end, rows)
            last = rows.last
        for _, kept in sampled:
            kept.add(_Rows(last, last))

    def _keep(self, digest: bytes, begin: int, end: int, rows: _Rows) -> _Rows | None:
        """Take a prefix into the sample, if it belongs there."""
        number = int.from_bytes(digest)
        if number >= self._below:
            return None
        if (kept := self._kept.get(number)) is None:
            kept = self._kept[number] = _Prefix(begin, end, rows)
        else:
            kept.begin = max(kept.begin, begin)
            kept.rows.add(rows)
        return kept.rows


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=_HASH_BYTES).digest()
