"""The order of the table."""

import numpy as np

from batchllm.prefix.policies.demand import Demand
from batchllm.prefix.tree import Ints


def table_order(demand: Demand) -> Ints:
    """Leaves by the first row that asks for them: what an engine without a plan would do."""
    return np.argsort(demand.tree.leaf_row, kind="stable")
