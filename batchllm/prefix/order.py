"""The order in which a window's leaves are admitted. Policies are functions, listed by name."""

from collections.abc import Callable

import numpy as np

from batchllm.errors import UsageError
from batchllm.prefix.tree import NO_NODE, Ints, PrefixTree

Policy = Callable[[PrefixTree, Ints], Ints]


def table_order(tree: PrefixTree, decode_tokens: Ints) -> Ints:
    """Leaves by the first row that asks for them: what an engine without a plan would do."""
    return np.argsort(tree.leaf_row, kind="stable")


def depth_first(tree: PrefixTree, decode_tokens: Ints) -> Ints:
    """Leaves in lexicographic order: every prefix lives in one piece and no longer than needed."""
    return np.arange(tree.num_leaves)


def decode_ratio(tree: PrefixTree, decode_tokens: Ints) -> Ints:
    """Depth-first, siblings by decode tokens per prefill token, descending.

    Groups that mostly decode come first, so that their decodes are there to share steps with the
    later groups' prefill (BatchLLM, arXiv 2412.03594, section 5.1). Shared tokens count once, as
    they are computed once. BatchLLM orders top-level groups only; a chat template's constant head
    makes a whole table one group, so the rule is applied to the siblings at every level.
    """
    own_tokens = tree.leaf_length - tree.leaf_start
    node_decode, node_prefill = _subtree_sums(tree, decode_tokens, own_tokens)
    decode = np.concatenate([node_decode, decode_tokens])
    prefill = np.concatenate([node_prefill, own_tokens])
    return _walk(tree, -decode / np.maximum(prefill, 1))


def _subtree_sums(tree: PrefixTree, decode_tokens: Ints, own_tokens: Ints) -> tuple[Ints, Ints]:
    """Decode and prefill tokens under each node, shared tokens once; both [num_nodes]."""
    begin, end = tree.node_leaf_begin, tree.node_leaf_end
    decode_sum = np.concatenate([[0], np.cumsum(decode_tokens)])
    leaf_sum = np.concatenate([[0], np.cumsum(own_tokens)])
    node_sum = np.concatenate([[0], np.cumsum(tree.node_end - tree.node_start)])
    inner = node_sum[tree.node_subtree_end] - node_sum[:-1]
    return decode_sum[end] - decode_sum[begin], leaf_sum[end] - leaf_sum[begin] + inner


def _walk(tree: PrefixTree, cost: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Ints:
    """Leaves in depth-first order with siblings by ascending cost ([nodes, then leaves])."""
    num_nodes = tree.num_nodes
    parent = np.concatenate([tree.node_parent, tree.leaf_parent])
    by_family = np.lexsort((np.arange(len(parent)), cost, parent))
    family_begin = np.searchsorted(parent[by_family], np.arange(NO_NODE, num_nodes + 1))
    families = np.split(by_family, family_begin[1:-1])  # families[node + 1], NO_NODE first
    order: list[int] = []
    stack = families[0][::-1].tolist()
    while stack:
        item = stack.pop()
        if item < num_nodes:
            stack.extend(families[item + 1][::-1].tolist())
        else:
            order.append(item - num_nodes)
    return np.array(order, dtype=np.int64)


POLICIES: dict[str, Policy] = {
    "ratio": decode_ratio,
    "dfs": depth_first,
    "table-order": table_order,
}


def get_policy(name: str) -> Policy:
    """Look a policy up.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in POLICIES:
        raise UsageError(f"no policy named {name!r}; there are: {', '.join(POLICIES)}")
    return POLICIES[name]
