"""From a plan's arrays to the run state of its nodes and sequences."""

import numpy as np

from batchllm.prefix.plan import PrefixPlan
from batchllm.prefix.tree import PrefixTree
from batchllm.scheduler.state import Node, Segment, Sequence


def build_sequences(plan: PrefixPlan, max_model_len: int) -> list[Sequence]:
    """One sequence a leaf, linked to the shared nodes above it.

    Orders number nodes and leaves together in depth-first pre-order.
    """
    tree = plan.tree
    nodes = _build_nodes(plan)
    leaves = np.arange(tree.num_leaves)
    order = (leaves + np.searchsorted(tree.node_leaf_begin, leaves, side="right")).tolist()
    sequences = []
    columns = zip(
        order,
        tree.leaf_row.tolist(),
        tree.leaf_parent.tolist(),
        tree.leaf_start.tolist(),
        tree.leaf_length.tolist(),
        strict=True,
    )
    for leaf, (position, row, parent, start, length) in enumerate(columns):
        path = nodes[parent].path if parent >= 0 else ()
        for node in path:
            node.num_unfinished += 1
        request = plan.requests[row]
        sequences.append(
            Sequence(
                leaf=leaf,
                order=position,
                row_index=request.row_index,
                path=path,
                segment=Segment(start),
                tail_token_ids=plan.tokens[row][start:],
                max_tokens=min(request.sampling_params.max_tokens, max_model_len - length),
                sampling_params=request.sampling_params,
            )
        )
    return sequences


def _build_nodes(plan: PrefixPlan) -> list[Node]:
    tree: PrefixTree = plan.tree
    nodes: list[Node] = []
    example = tree.leaf_row[tree.node_leaf_begin].tolist()
    columns = zip(
        tree.node_parent.tolist(),
        tree.node_start.tolist(),
        tree.node_end.tolist(),
        tree.node_leaf_begin.tolist(),
        example,
        strict=True,
    )
    for index, (parent, start, end, leaf_begin, row) in enumerate(columns):
        node = Node(index + leaf_begin, plan.tokens[row][start:end], Segment(start))
        node.path = (*nodes[parent].path, node) if parent >= 0 else (node,)
        nodes.append(node)
    return nodes
