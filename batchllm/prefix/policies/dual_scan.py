"""From both ends at once: rows that compute much together with rows that read much."""

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.policies.demand import Demand, Floats, walk
from batchllm.prefix.tree import NO_NODE, Ints

_RECOMPUTE_SHARE = 0.01  # of what sharing saves, that splitting outliers off may cost
_OUTLIER = 4.0  # a leaf this many times denser or thinner than its node


def dual_scan(demand: Demand) -> Ints:
    """BlendServe's order (ASPLOS'26, sections 4 and 5): density-sorted, scanned from both ends.

    A row's density is its compute time, its part of what it shares included, over the time its
    decodes read memory. Siblings are sorted by density, so the tree's left end computes and its
    right end reads; leaves far from the density of their node are split off to the root as long as
    what that recomputes stays below 1 % of what sharing saves. Then rows are taken from both ends
    so that KV memory is divided as M_L : M_R = (rho_root - rho_R) : (rho_L - rho_root), which
    blends to the root's density.

    BlendServe steers by the memory in use at run time. Here the order is fixed beforehand: a row
    uses its tokens for as many steps as it decodes, and each side is given its share of that
    product, which over a window comes to the same.
    """
    tree = demand.tree
    if tree.num_leaves == 0:
        return np.zeros(0, dtype=np.int64)
    own = (tree.leaf_length - tree.leaf_start).astype(np.float64)
    decodes = demand.decode_tokens.astype(np.float64)
    compute = (own + decodes) * demand.token_seconds
    # Every decode reads its prompt and half of its answer.
    use = decodes * (tree.leaf_length + decodes / 2)
    read = np.maximum(use * demand.kv_read_seconds, 1e-30)
    length: Floats = (tree.node_end - tree.node_start) * np.float64(demand.token_seconds)
    density = np.concatenate(
        [
            demand.per_node(length, compute) / demand.per_node(np.zeros_like(length), read),
            (compute + _shared_compute(demand)) / read,
        ]
    )
    split = _outliers(demand, density)
    order = walk(tree, -density)
    if split.any():
        order = _by_density(tree.leaf_parent, order, density, split)
    total = float((compute.sum() + length.sum()) / read.sum())
    return _from_both_ends(order, density[tree.num_nodes :][order], use[order], total)


def _shared_compute(demand: Demand) -> Floats:
    """Each leaf's part of the time that the nodes above it take, [num_leaves]."""
    tree = demand.tree
    length = (tree.node_end - tree.node_start) * demand.token_seconds
    part = length / np.maximum(tree.node_leaf_end - tree.node_leaf_begin, 1)
    change = np.zeros(tree.num_leaves + 1)
    np.add.at(change, tree.node_leaf_begin, part)
    np.subtract.at(change, tree.node_leaf_end, part)
    return np.cumsum(change[:-1])


def _outliers(demand: Demand, density: Floats) -> NDArray[np.bool_]:
    """Leaves to split off, cheapest first, [num_leaves]."""
    tree = demand.tree
    split = np.zeros(tree.num_leaves, dtype=np.bool_)
    inside = np.flatnonzero(tree.leaf_parent != NO_NODE)
    ratio = density[tree.num_nodes + inside] / density[tree.leaf_parent[inside]]
    far = inside[(ratio > _OUTLIER) | (ratio < 1 / _OUTLIER)]
    cost = tree.leaf_start[far]  # its shared tokens, computed once more
    saved = int(tree.leaf_length.sum()) - tree.num_tokens
    cheap = np.argsort(cost, kind="stable")
    fits = np.cumsum(cost[cheap]) <= _RECOMPUTE_SHARE * saved
    split[far[cheap[fits]]] = True
    return split


def _by_density(leaf_parent: Ints, order: Ints, density: Floats, split: NDArray[np.bool_]) -> Ints:
    """Put the leaves that were split off among the others where their density belongs."""
    num_nodes = len(density) - len(leaf_parent)
    kept, moved = order[~split[order]], order[split[order]]
    mine = density[num_nodes + kept]
    # The kept leaves descend only roughly: a running minimum makes them searchable.
    descending = np.minimum.accumulate(mine)
    moved = moved[np.argsort(-density[num_nodes + moved], kind="stable")]
    places = np.searchsorted(-descending, -density[num_nodes + moved], side="left")
    return np.insert(kept, places, moved)


def _from_both_ends(order: Ints, density: Floats, use: Floats, total: float) -> Ints:
    """Take from the left (dense) and the right (thin) end so that the blend has density `total`."""
    left, right = 0, len(order) - 1
    given_left = given_right = 0.0
    leaves, densities, uses = order.tolist(), density.tolist(), use.tolist()
    chosen: list[int] = []
    while left <= right:
        high, low = densities[left], densities[right]
        share = min(max((total - low) / (high - low), 0.0), 1.0) if high > low else 1.0
        if given_left * (1 - share) <= given_right * share:
            given_left += uses[left]
            chosen.append(leaves[left])
            left += 1
        else:
            given_right += uses[right]
            chosen.append(leaves[right])
            right -= 1
    return np.array(chosen, dtype=np.int64)
