"""From a window's requests to what the scheduler runs: a tree and an order of its leaves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from batchllm.prefix.policies.demand import Demand
from batchllm.prefix.policies.registry import POLICIES, STREAMING
from batchllm.prefix.tree import Ints, PrefixTree, build_tree, flat_tree
from batchllm.request import RaggedTokens, Request, SamplingParams


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """A window planned. `tree` speaks of its rows by their number i in the window.

    `tokens[i]` is a row's prompt, `row_index[i]` its number in the whole input, `max_tokens[i]` its
    longest answer, and `params[params_index[i]]` how it is sampled (`params` are distinct).
    `leaf_order` is the order of admission. Where fewer tokens a step than may be suit it, they are
    `step_tokens`.
    """

    tokens: RaggedTokens
    row_index: Ints
    max_tokens: Ints
    params: list[SamplingParams]
    params_index: Ints
    tree: PrefixTree
    leaf_order: Ints
    step_tokens: int | None = None

    def rows_of(self, leaves: Ints) -> Ints:
        """Their rows' numbers in the whole input, duplicates included."""
        begin = self.tree.row_offsets[leaves]
        count = self.tree.row_offsets[leaves + 1] - begin
        places = np.repeat(begin - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))
        return self.row_index[self.tree.rows[places]]


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
    requests: Sequence[Request],
    *,
    policy: str = "ratio",
    sharing: bool = True,
    granularity: int = 1,
) -> PrefixPlan:
    """Plan `requests` (no empty prompt among them); see `plan_tokens`."""
    tokens = RaggedTokens.from_sequences([r.prompt_token_ids for r in requests])
    row_index = np.array([r.row_index for r in requests], dtype=np.int64)
    params, params_index = _distinct([r.sampling_params for r in requests])
    return plan_tokens(
        tokens,
        params,
        params_index,
        row_index=row_index,
        policy=policy,
        sharing=sharing,
        granularity=granularity,
    )


def plan_tokens(
    tokens: RaggedTokens,
    params: list[SamplingParams],
    params_index: Ints | None = None,
    *,
    row_index: Ints | None = None,
    policy: str = "ratio",
    sharing: bool = True,
    granularity: int = 1,
) -> PrefixPlan:
    """Plan prompts given as arrays.

    Args:
        tokens: the prompts, none of them empty.
        params: distinct sampling parameters.
        params_index: which of them each row has, [num_rows]; None gives all rows the first.
        row_index: the rows' numbers in the whole input, [num_rows]; None counts from 0.
        policy: the order of admission, one of `POLICIES`; or `streaming`, which shares nothing
            beforehand and keeps the table's order.
        sharing: whether shared prefixes are computed once; else every row is alone.
        granularity: of so many tokens, and multiples of them, are the prefixes that are shared.
    """
    if params_index is None:
        params_index = np.zeros(len(tokens), dtype=np.int64)
    if row_index is None:
        row_index = np.arange(len(tokens))
    # Greedy rows with equal parameters get the same answer; sampled rows draw their own.
    merge_key = np.array([i if p.greedy else -1 for i, p in enumerate(params)], dtype=np.int64)
    shares = sharing and policy != STREAMING
    tree = flat_tree(tokens)
    if shares:
        tree = build_tree(tokens, merge_key[params_index], granularity=granularity)
    max_tokens = np.array([p.max_tokens for p in params], dtype=np.int64)[params_index]
    leaves = np.arange(tree.num_leaves)
    plan = PrefixPlan(tokens, row_index, max_tokens, params, params_index, tree, leaves)
    return plan if policy == STREAMING else reorder(plan, policy)


def reorder(plan: PrefixPlan, policy: str, outputs: Ints | None = None) -> PrefixPlan:
    """The plan with its leaves in another policy's order.

    `outputs` [num_leaves] are the expected lengths of the answers; None expects `max_tokens`.
    """
    expected = plan.max_tokens[plan.tree.leaf_row] if outputs is None else outputs
    return replace(plan, leaf_order=POLICIES[policy](Demand(plan.tree, expected)))


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


def _distinct(each: list[SamplingParams]) -> tuple[list[SamplingParams], Ints]:
    """The distinct ones, and which of them each is; many are the same object."""
    by_identity: dict[int, int] = {}
    by_value: dict[SamplingParams, int] = {}
    index = np.empty(len(each), dtype=np.int64)
    for i, params in enumerate(each):
        found = by_identity.get(id(params))
        if found is None:
            found = by_identity[id(params)] = by_value.setdefault(params, len(by_value))
        index[i] = found
    return list(by_value), index
