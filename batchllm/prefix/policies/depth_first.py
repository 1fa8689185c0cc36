"""The order of the sorted prompts."""

import numpy as np

from batchllm.prefix.policies.demand import Demand
from batchllm.prefix.tree import Ints


def depth_first(demand: Demand) -> Ints:
    """Leaves in lexicographic order: every prefix lives in one piece and no longer than needed."""
    return np.arange(demand.tree.num_leaves)
