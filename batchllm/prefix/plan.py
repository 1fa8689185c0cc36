"""From a window's requests to what the scheduler runs: a tree and an order of its leaves."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from batchllm.prefix.order import get_policy
from batchllm.prefix.tree import Ints, PrefixTree, build_tree, flat_tree
from batchllm.request import RaggedTokens, Request


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """A window planned.

    `requests[i]` and `tokens[i]` belong together; `tree` speaks of them by that index;
    `leaf_order` is the order of admission.
    """

    requests: Sequence[Request]
    tokens: RaggedTokens
    tree: PrefixTree
    leaf_order: Ints


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """A shared prefix as a person would count it, for reports.

    `num_tokens` is the node's own length, `depth` where it ends, `num_rows` how many rows pass
    through it, and `saved_tokens` what sharing it saves.
    """

    node: int
    depth: int
    num_tokens: int
    num_rows: int
    saved_tokens: int
    example_row: int


def plan_requests(
    requests: Sequence[Request], *, policy: str = "ratio", sharing: bool = True
) -> PrefixPlan:
    """Plan `requests` (no empty prompt among them); `sharing=False` computes every row alone."""
    order = get_policy(policy)
    tokens = RaggedTokens.from_sequences([r.prompt_token_ids for r in requests])
    tree = build_tree(tokens, _merge_keys(requests)) if sharing else flat_tree(tokens)
    max_tokens = np.array([r.sampling_params.max_tokens for r in requests], dtype=np.int64)
    expected = max_tokens[tree.leaf_row] if len(requests) else max_tokens
    return PrefixPlan(requests, tokens, tree, order(tree, expected))


def biggest_groups(tree: PrefixTree, limit: int) -> list[PrefixGroup]:
    """The nodes whose sharing saves most, largest first."""
    rows = tree.row_offsets[tree.node_leaf_end] - tree.row_offsets[tree.node_leaf_begin]
    length = tree.node_end - tree.node_start
    saved = (rows - 1) * length
    best = np.argsort(-saved, kind="stable")[:limit].tolist()
    return [
        PrefixGroup(
            node=node,
            depth=int(tree.node_end[node]),
            num_tokens=int(length[node]),
            num_rows=int(rows[node]),
            saved_tokens=int(saved[node]),
            example_row=int(tree.leaf_row[tree.node_leaf_begin[node]]),
        )
        for node in best
    ]


def _merge_keys(requests: Sequence[Request]) -> Ints:
    """Greedy rows with equal parameters get the same answer; sampled rows draw their own."""
    keys: dict[object, int] = {}
    return np.array(
        [
            keys.setdefault(params, len(keys)) if (params := r.sampling_params).greedy else -1
            for r in requests
        ],
        dtype=np.int64,
    )
