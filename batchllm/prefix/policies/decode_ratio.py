"""Groups that mostly decode first."""

import numpy as np

from batchllm.prefix.policies.demand import Demand, walk
from batchllm.prefix.tree import Ints


def decode_ratio(demand: Demand) -> Ints:
    """Depth-first, siblings by decode tokens per prefill token, descending.

    Groups that mostly decode come first, so that their decodes are there to share steps with the
    later groups' prefill (BatchLLM, arXiv 2412.03594, section 5.1). Shared tokens count once, as
    they are computed once. BatchLLM orders top-level groups only; a chat template's constant head
    makes a whole table one group, so the rule is applied to the siblings at every level.
    """
    tree = demand.tree
    own = (tree.leaf_length - tree.leaf_start).astype(np.float64)
    length = (tree.node_end - tree.node_start).astype(np.float64)
    decodes = demand.decode_tokens.astype(np.float64)
    decode = np.concatenate([demand.per_node(np.zeros_like(length), decodes), decodes])
    prefill = np.concatenate([demand.per_node(length, own), own])
    return walk(tree, -decode / np.maximum(prefill, 1))
