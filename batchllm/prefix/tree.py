"""The prefix tree of a window, as arrays."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.sorting import common_prefix_lengths, sort_sequences
from batchllm.request import RaggedTokens

Ints = NDArray[np.int64]
NO_NODE = -1


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Which tokens of a window are shared by whom, exact to the token, at every level.

    A *node* is a run of tokens that two or more distinct prompts share: positions
    `[node_start, node_end)` of any of its leaves. A *leaf* is one distinct prompt; the tokens
    behind its deepest node, at least the last one, are its own. Leaves stand in lexicographic
    order and nodes in depth-first pre-order, so that a node's leaves are the slice
    `[node_leaf_begin, node_leaf_end)` and its descendants are the nodes right behind it.

    Why a leaf always owns its last token: the logits of that position are what the row is
    sampled from, so it has to pass through the model for each row even where another row's
    prompt continues from it. `num_repeated_tokens` counts what that repeats.

    Shapes: `node_*` [num_nodes], `leaf_*` [num_leaves]; `rows` [num_rows] lists the requests of
    leaf i at `[row_offsets[i], row_offsets[i + 1])`: more than one where exact duplicates were
    merged. Parents are `NO_NODE` at the top.
    """

    node_parent: Ints
    node_start: Ints
    node_end: Ints
    node_leaf_begin: Ints
    node_leaf_end: Ints
    leaf_parent: Ints
    leaf_length: Ints
    rows: Ints
    row_offsets: Ints
    num_distinct_prefixes: int

    @property
    def num_nodes(self) -> int:
        return len(self.node_parent)

    @property
    def num_leaves(self) -> int:
        return len(self.leaf_parent)

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def leaf_start(self) -> Ints:
        """Position of each leaf's first own token, [num_leaves]."""
        ends = np.append(self.node_end, 0)  # NO_NODE = -1 picks the appended 0
        return ends[self.leaf_parent]

    @property
    def leaf_row(self) -> Ints:
        """One request of each leaf (its first in the table), [num_leaves]."""
        return self.rows[self.row_offsets[:-1]]

    @property
    def node_subtree_end(self) -> Ints:
        """Nodes `[i, node_subtree_end[i])` are node i and its descendants, [num_nodes]."""
        return np.searchsorted(self.node_leaf_begin, self.node_leaf_end, side="left")

    @property
    def num_tokens(self) -> int:
        """Tokens to compute so that every row can be sampled."""
        return int(
            (self.node_end - self.node_start).sum() + (self.leaf_length - self.leaf_start).sum()
        )

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of all rows, shared ones once a row."""
        return int((self.leaf_length * self.row_counts()).sum())

    @property
    def num_repeated_tokens(self) -> int:
        """Last prompt tokens computed again (see the class)."""
        return self.num_tokens - self.num_distinct_prefixes

    def row_counts(self) -> Ints:
        """Rows answered by each leaf, [num_leaves]."""
        return np.diff(self.row_offsets)


def build_tree(
    tokens: RaggedTokens, merge_key: Ints | None = None, *, granularity: int = 1
) -> PrefixTree:
    """Build the tree of all `tokens` (none empty).

    Args:
        tokens: the prompts.
        merge_key: int64 [num_rows]; rows with equal prompts and equal keys >= 0 become one leaf
            (their answers are the same by construction); -1 keeps a row apart. None merges all.
        granularity: nodes begin and end at multiples of it; what is left over is each leaf's own.

    Cost: the sort, plus work proportional to the shared tokens, plus one pass over the leaves.
    """
    num_rows = len(tokens)
    if num_rows == 0:
        return _assemble([], _empty(), _empty(), _empty(), np.zeros(1, np.int64), 0)
    assert tokens.lengths.min() > 0, "an empty prompt has no place in the tree"
    order = sort_sequences(tokens)
    lengths = tokens.lengths[order]
    shared = common_prefix_lengths(tokens, order)
    equal = (shared == lengths[:-1]) & (shared == lengths[1:])
    distinct = int(lengths.sum() - shared.sum())

    key = np.zeros(num_rows, np.int64) if merge_key is None else merge_key
    if equal.any():
        # Among equal prompts, bring equal keys together; neighbours' shared lengths stay the same.
        run = np.concatenate([[0], np.cumsum(~equal)])
        order = order[np.lexsort((order, key[order], run))]
    merges = equal & (key[order[:-1]] == key[order[1:]]) & (key[order[1:]] >= 0)
    starts_leaf = np.concatenate([[True], ~merges])
    row_offsets = np.append(np.flatnonzero(starts_leaf), num_rows)
    leaf_length = lengths[starts_leaf]
    # Never share a leaf's last token: see the class.
    shared = np.minimum(shared[~merges], np.minimum(leaf_length[:-1], leaf_length[1:]) - 1)
    shared = shared // granularity * granularity
    nodes = _intervals(shared)
    return _assemble(nodes, shared, leaf_length, order, row_offsets, distinct)


def flat_tree(tokens: RaggedTokens) -> PrefixTree:
    """Return the tree without any sharing: every row a leaf of its own, in table order."""
    num_rows = len(tokens)
    rows = np.arange(num_rows, dtype=np.int64)
    total = int(tokens.lengths.sum())
    return _assemble([], _empty(), tokens.lengths, rows, np.arange(num_rows + 1), total)


def _empty() -> Ints:
    return np.zeros(0, dtype=np.int64)


def _intervals(shared: Ints) -> list[tuple[int, int, int]]:
    """Maximal runs of leaves with a common prefix, as (first leaf, depth, last leaf + 1).

    One pass with a stack over the neighbours' shared lengths, [num_leaves - 1].
    """
    found: list[tuple[int, int, int]] = []
    depths: list[int] = []
    lefts: list[int] = []
    for leaf, depth in enumerate([*shared.tolist(), 0]):
        left = leaf
        while depths and depths[-1] > depth:
            left = lefts.pop()
            found.append((left, depths.pop(), leaf + 1))
        if depth and (not depths or depths[-1] < depth):
            depths.append(depth)
            lefts.append(left)
    found.sort()  # first leaf, then depth: depth-first pre-order
    return found


def _assemble(
    nodes: list[tuple[int, int, int]],
    shared: Ints,
    leaf_length: Ints,
    rows: Ints,
    row_offsets: Ints,
    num_distinct: int,
) -> PrefixTree:
    table = np.array(nodes, dtype=np.int64).reshape(-1, 3)
    begin, end_depth, end = table[:, 0], table[:, 1], table[:, 2]
    leaf_parent = np.full(len(leaf_length), NO_NODE, dtype=np.int64)
    parent = np.full(len(nodes), NO_NODE, dtype=np.int64)
    for node, (first, _, last) in enumerate(nodes):
        parent[node] = leaf_parent[first]  # in pre-order, the last one written there encloses us
        leaf_parent[first:last] = node
    start = np.append(end_depth, 0)[parent]
    return PrefixTree(
        node_parent=parent,
        node_start=start,
        node_end=end_depth,
        node_leaf_begin=begin,
        node_leaf_end=end,
        leaf_parent=leaf_parent,
        leaf_length=leaf_length,
        rows=rows,
        row_offsets=row_offsets,
        num_distinct_prefixes=num_distinct,
    )
