"""The run state of a window, as arrays: the scheduler alone changes it."""

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.plan import PrefixPlan
from batchllm.request import TokenIds

Ints = NDArray[np.int64]
NOBODY = -1
_NONE: Ints = np.zeros(0, dtype=np.int64)


class Segments:
    """Every tree node and every leaf of a window, each a run of KV with one owner.

    Segments are numbered in depth-first pre-order, nodes and leaves together: what lies below a
    node are the numbers `(node, subtree_end[node])`, and a leaf's number is the number of its
    sequence. A sequence's private KV is its leaf's own prompt tokens, then its output.

    Fixed, all [num_segments]: `parent` (`NOBODY` at the top), `subtree_end`, `start` (position of
    the first token), `length` (prompt tokens), `token_begin` (place of the first in the plan's
    tokens), `leaf` (`NOBODY` for nodes), and of leaves `max_tokens`, `ignore_eos`, `row_index`,
    `params_index`.

    State: `num_computed` tokens have their KV, or will once the step scheduled last has run;
    `high_water` is the most that had it when it was dropped: computing below that is repetition.
    Of leaves, `num_outputs`, and `num_fresh`: prompt tokens computed for this leaf before others;
    `has_ended` if that was learned after one more token of it was scheduled, perhaps.
    `owner` is the leaf that a node is being, or was last, computed for; a leaf's is itself.
    """

    def __init__(self, plan: PrefixPlan, max_model_len: int) -> None:
        tree = plan.tree
        leaves = np.arange(tree.num_leaves)
        self.of_node: Ints = np.arange(tree.num_nodes) + tree.node_leaf_begin
        self.of_leaf: Ints = leaves + np.searchsorted(tree.node_leaf_begin, leaves, side="right")
        nodes, leaf_row = self.of_node, tree.leaf_row
        self.count = tree.num_nodes + tree.num_leaves
        self.tokens = plan.tokens
        self.params = plan.params

        def column(of_nodes: Ints | int, of_leaves: Ints) -> Ints:
            values = np.empty(self.count, dtype=np.int64)
            values[nodes] = of_nodes
            values[self.of_leaf] = of_leaves
            return values

        upward = np.append(nodes, NOBODY)  # NO_NODE = -1 picks the appended one
        self.parent = column(upward[tree.node_parent], upward[tree.leaf_parent])
        self.subtree_end = column(tree.node_subtree_end + tree.node_leaf_end, self.of_leaf + 1)
        self.start = column(tree.node_start, tree.leaf_start)
        self.length = column(tree.node_end, tree.leaf_length) - self.start
        example = leaf_row[tree.node_leaf_begin]
        offsets = plan.tokens.offsets
        self.token_begin = column(offsets[example], offsets[leaf_row]) + self.start
        self.leaf = column(NOBODY, leaves)
        self.row_index = column(NOBODY, plan.row_index[leaf_row])
        self.params_index = column(NOBODY, plan.params_index[leaf_row])
        longest = np.minimum(plan.max_tokens[leaf_row], max_model_len - tree.leaf_length)
        self.max_tokens = column(0, longest)
        ignore = np.array([p.ignore_eos for p in plan.params], dtype=np.bool_)
        self.ignore_eos: NDArray[np.bool_] = np.zeros(self.count, dtype=np.bool_)
        self.ignore_eos[self.of_leaf] = ignore[plan.params_index[leaf_row]]

        self.num_computed: Ints = np.zeros(self.count, dtype=np.int64)
        self.high_water: Ints = np.zeros(self.count, dtype=np.int64)
        self.num_outputs: Ints = np.zeros(self.count, dtype=np.int64)
        self.num_fresh: Ints = np.zeros(self.count, dtype=np.int64)
        self.has_ended: NDArray[np.bool_] = np.zeros(self.count, dtype=np.bool_)
        self.owner: Ints = np.arange(self.count)
        self.outputs = OutputTokens(self.count)

    def pending(self, segments: Ints) -> Ints:
        """Tokens whose KV is still to be computed, [n]."""
        total = self.length[segments] + self.num_outputs[segments]
        return total - self.num_computed[segments]

    def is_leaf(self, segments: Ints) -> NDArray[np.bool_]:
        """Which of the segments are a leaf's, [n]."""
        leaves: NDArray[np.bool_] = self.leaf[segments] != NOBODY
        return leaves

    def blocks_above(self, block_size: int) -> Ints:
        """Blocks of the whole chain of nodes above each segment, [num_segments]."""
        blocks = -(-self.length[self.of_node] // block_size)
        change = np.zeros(self.count + 1, dtype=np.int64)
        np.add.at(change, self.of_node + 1, blocks)  # from behind the node to the subtree's end
        np.subtract.at(change, self.subtree_end[self.of_node], blocks)
        return np.cumsum(change[:-1])

    def token_ids(self, segments: Ints, begin: Ints, count: Ints) -> TokenIds:
        """Tokens `[begin, begin + count)` of each segment, prompt then output, flat."""
        ends = np.cumsum(count)
        within = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(
            begin - ends + count, count
        )
        who = np.repeat(segments, count)
        output = within - self.length[who]
        prompt = output < 0
        found = np.empty(len(within), dtype=np.int32)
        found[prompt] = self.tokens.values[self.token_begin[who[prompt]] + within[prompt]]
        found[~prompt] = self.outputs.get(who[~prompt], output[~prompt])
        return found

    def account(self, segments: Ints, counts: Ints) -> tuple[int, int]:
        """Mark `counts` more tokens of prefill computed; segments distinct.

        (A decode's token is neither a prompt token nor a repeat: it only moves `num_computed`.)

        Returns:
            How many of them are prompt tokens, and how many (of prompt or output) are repeats.
        """
        begin = self.num_computed[segments]
        end = begin + counts
        in_prompt = np.minimum(end, self.length[segments])
        fresh = np.maximum(begin, self.high_water[segments])
        np.add.at(self.num_fresh, self.owner[segments], np.maximum(in_prompt - fresh, 0))
        self.num_computed[segments] = end
        repeats = np.minimum(end, fresh) - begin
        return int(np.maximum(in_prompt - begin, 0).sum()), int(repeats.sum())

    def drop(self, segments: Ints) -> None:
        """The segments' KV is gone: computing it again is repetition."""
        had = self.num_computed[segments]
        self.high_water[segments] = np.maximum(self.high_water[segments], had)
        self.num_computed[segments] = 0


class ChildCount:
    """How many of a node's children count; a node itself counts as long as one of them does.

    So the count of a node says whether any leaf below it counts, and a leaf that changes touches
    only the ancestors for which that changes the answer. Those are few at a time: plain loops over
    views of the arrays cost a fraction of what numpy's calls do.
    """

    def __init__(self, parent: Ints, counting: Ints = _NONE) -> None:
        """Nobody counts at first but the segments `counting`, with all nodes above them."""
        self.children: Ints = np.zeros(len(parent), dtype=np.int64)
        while len(counting):
            above = parent[counting]
            above = above[above != NOBODY]
            counting = np.unique(above[self.children[above] == 0])
            np.add.at(self.children, above, 1)
        self._parent_of = parent.data
        self._children_of = self.children.data

    def add(self, segments: Ints) -> Ints:
        """Let the segments (distinct, not counting yet) count; returns nodes that now do too."""
        children, changed = self._children_of, []
        parents = self._above(segments.tolist())
        while parents:
            new = sorted({parent for parent in parents if children[parent] == 0})
            for parent in parents:
                children[parent] += 1
            changed += new
            parents = self._above(new)
        return np.array(changed, dtype=np.int64) if changed else _NONE

    def remove(self, segments: Ints) -> Ints:
        """Let the segments (distinct, counting) no longer count.

        Returns nodes that do not either now, descendants before their ancestors.
        """
        children, changed = self._children_of, []
        parents = self._above(segments.tolist())
        while parents:
            for parent in parents:
                children[parent] -= 1
            gone = sorted({parent for parent in parents if children[parent] == 0})
            changed += gone
            parents = self._above(gone)
        return np.array(changed, dtype=np.int64) if changed else _NONE

    def _above(self, segments: list[int]) -> list[int]:
        parent_of = self._parent_of
        return [parent for s in segments if (parent := parent_of[s]) != NOBODY]


class OutputTokens:
    """The tokens sampled so far, of the sequences that are under way; rows are reused."""

    def __init__(self, num_owners: int) -> None:
        self._row: Ints = np.full(num_owners, NOBODY, dtype=np.int64)
        self._tokens: TokenIds = np.zeros((64, 16), dtype=np.int32)
        self._free = list(range(63, -1, -1))

    def get(self, owners: Ints, positions: Ints) -> TokenIds:
        """Output `positions[i]` of `owners[i]`, [n]."""
        return self._tokens[self._row[owners], positions]

    def put(self, owners: Ints, positions: Ints, token_ids: TokenIds) -> None:
        """Set output `positions[i]` of `owners[i]`; owners distinct."""
        if len(owners) == 0:
            return
        new = owners[self._row[owners] == NOBODY]
        if len(new) > len(self._free):
            height = len(self._tokens)
            extra = max(height, len(new))
            self._tokens = np.pad(self._tokens, ((0, extra), (0, 0)))
            self._free = [*range(height + extra - 1, height - 1, -1), *self._free]
        if len(new):
            self._row[new] = self._free[-len(new) :]
            del self._free[-len(new) :]
        widest = int(positions.max()) + 1
        if widest > self._tokens.shape[1]:
            extra = max(widest, 2 * self._tokens.shape[1]) - self._tokens.shape[1]
            self._tokens = np.pad(self._tokens, ((0, 0), (0, extra)))
        self._tokens[self._row[owners], positions] = token_ids

    def take(self, owner: int, count: int) -> TokenIds:
        """The owner's `count` tokens, which are forgotten here."""
        row = int(self._row[owner])
        if row == NOBODY:  # only simulated: the answer has a length, and no tokens to tell apart
            return np.zeros(count, dtype=np.int32)
        tokens = self._tokens[row, :count].copy()
        self._row[owner] = NOBODY
        self._free.append(row)
        return tokens
