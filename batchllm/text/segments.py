"""Texts as runs of segments, so that what many of them start with is tokenized once."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

from batchllm.prefix.sorting import common_prefix
from batchllm.request import RaggedTokens
from batchllm.text import ragged
from batchllm.text.cuts import Cuts

# A shorter stretch costs about as much to look after as to tokenize again.
_MIN_CHARS = 64


@dataclass(frozen=True, slots=True)
class SegmentedTexts:
    """Text i is the join of the `segments` that `runs[i]` numbers; segments are distinct."""

    segments: list[str]
    runs: list[list[int]]

    def join(self, tokens: RaggedTokens, cuts: Cuts | None = None) -> RaggedTokens:
        """The texts' tokens out of the segments'; with `cuts`, its ids go around each text."""
        runs = self.runs
        if cuts is not None:
            first, last = len(tokens), len(tokens) + 1
            around = np.cumsum([len(cuts.before), len(cuts.after)])
            tokens = RaggedTokens(
                np.concatenate([tokens.values, cuts.before, cuts.after]),
                np.concatenate([tokens.offsets, tokens.offsets[-1] + around]),
            )
            runs = [[first, *run, last] for run in runs]
        ends = np.zeros(len(runs) + 1, dtype=np.int64)
        np.cumsum([len(run) for run in runs], out=ends[1:])
        numbers = np.fromiter(chain.from_iterable(runs), np.int64, int(ends[-1]))
        taken = ragged.take_rows(tokens, numbers)
        return RaggedTokens(taken.values, taken.offsets[ends])


@dataclass(frozen=True, slots=True)
class _Node:
    """A shared start of texts: `depth` characters, of which those up to `cut` are segments."""

    depth: int
    cut: int
    number: int


def segment(texts: Sequence[str], cuts: Cuts) -> SegmentedTexts | None:
    """Cut texts where they part from others, or None where none have a start in common.

    In sorted order, the texts below a node of their prefix tree are neighbours, and the node is as
    deep as the least prefix two neighbours among them have in common. So the tree is walked with a
    stack, and each node cut at the last place before it ends that allows it. What lies between
    that place and the node's end, a word or two, is tokenized for each child. Nodes that would add
    fewer than `_MIN_CHARS` characters are left out, so a text has at most one segment for each so
    many. The walk takes time linear in rows, after sorting; memory is the texts' once more.
    """
    heads = Counter(text[:_MIN_CHARS] for text in texts)
    if len(heads) == len(texts):
        return None
    numbers: dict[str, int] = {}
    runs: list[list[int]] = [[]] * len(texts)
    order = []
    for row, text in enumerate(texts):
        if heads[text[:_MIN_CHARS]] > 1:
            order.append(row)
        else:
            runs[row] = [numbers.setdefault(text, len(numbers))]
    order.sort(key=texts.__getitem__)
    depths = [0, *(_shared(texts[a], texts[b]) for a, b in pairwise(order)), 0]
    shallower = _next_shallower(depths)
    path: list[_Node] = []
    for i, row in enumerate(order):
        text = texts[row]
        while path and path[-1].depth > depths[i]:
            path.pop()
        start = path[-1].cut if path else 0
        for depth in reversed(_nodes_opening(i, depths, shallower)):
            cut = cuts.last(text, start, depth)
            if cut is not None and cut - start >= _MIN_CHARS:
                number = numbers.setdefault(text[start:cut], len(numbers))
                path.append(_Node(depth, cut, number))
                start = cut
        runs[row] = [node.number for node in path]
        runs[row].append(numbers.setdefault(text[start:], len(numbers)))
    return SegmentedTexts(list(numbers), runs)


def _nodes_opening(i: int, depths: list[int], shallower: list[int]) -> list[int]:
    """The depths of the nodes whose first text is the i-th, deepest first."""
    found = []
    j = i + 1
    while depths[j] > depths[i]:
        found.append(depths[j])
        j = shallower[j]
    return found


def _next_shallower(depths: list[int]) -> list[int]:
    """For each place, the next one with a smaller depth; the last place where there is none."""
    found = [len(depths) - 1] * len(depths)
    for j in reversed(range(len(depths) - 1)):
        k = j + 1
        while depths[k] >= depths[j] and k < len(depths) - 1:
            k = found[k]
        found[j] = k
    return found


def _shared(a: str, b: str) -> int:
    """How many characters two texts start with in common; 0 if fewer than `_MIN_CHARS`."""
    return common_prefix(a, b) if a[:_MIN_CHARS] == b[:_MIN_CHARS] else 0
