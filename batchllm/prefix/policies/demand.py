"""What the leaves and nodes of a tree ask for: what every policy goes by."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.tree import NO_NODE, Ints, PrefixTree

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Demand:
    """A tree and what its rows are expected to cost.

    `decode_tokens` [num_leaves] are the expected lengths of the answers. `token_seconds` is what
    a token costs in the model's products and `kv_read_seconds` what reading one token's KV costs;
    only their ratio matters to an order.
    """

    tree: PrefixTree
    decode_tokens: Ints
    token_seconds: float = 1.0
    kv_read_seconds: float = 1e-4  # as on an H100 with a model of 8 billion parameters

    def per_node(self, of_nodes: Floats, of_leaves: Floats) -> Floats:
        """Sums over each node's subtree, itself included, each node and leaf once, [num_nodes]."""
        tree = self.tree
        leaves = np.concatenate([[0.0], np.cumsum(of_leaves)])
        nodes = np.concatenate([[0.0], np.cumsum(of_nodes)])
        sums: Floats = leaves[tree.node_leaf_end] - leaves[tree.node_leaf_begin]
        sums += nodes[tree.node_subtree_end] - nodes[:-1]
        return sums


def walk(tree: PrefixTree, cost: Floats) -> Ints:
    """Leaves in depth-first order with siblings by ascending cost ([nodes, then leaves])."""
    num_nodes = tree.num_nodes
    parent = np.concatenate([tree.node_parent, tree.leaf_parent])
    by_family = np.lexsort((np.arange(len(parent)), cost, parent))
    bounds = np.searchsorted(parent[by_family], np.arange(NO_NODE, num_nodes + 1)).tolist()
    members = by_family.tolist()
    order: list[int] = []
    stack = members[bounds[0] : bounds[1]][::-1]  # the family of NO_NODE
    while stack:
        item = stack.pop()
        if item < num_nodes:
            stack.extend(members[bounds[item + 1] : bounds[item + 2]][::-1])
        else:
            order.append(item - num_nodes)
    return np.array(order, dtype=np.int64)
