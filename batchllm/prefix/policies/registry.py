"""Policies by name."""

from collections.abc import Callable

from batchllm.errors import UsageError
from batchllm.prefix.policies.decode_ratio import decode_ratio
from batchllm.prefix.policies.demand import Demand
from batchllm.prefix.policies.depth_first import depth_first
from batchllm.prefix.policies.dual_scan import dual_scan
from batchllm.prefix.policies.table_order import table_order
from batchllm.prefix.tree import Ints

Policy = Callable[[Demand], Ints]

POLICIES: dict[str, Policy] = {
    "ratio": decode_ratio,
    "dfs": depth_first,
    "dual-scan": dual_scan,
    "table-order": table_order,
}
STREAMING = "streaming"  # no order but a scheduler of its own
AUTO = "auto"  # the one that a simulation finds fastest


def policy_names() -> list[str]:
    """All names that a run's policy may have."""
    return [AUTO, *POLICIES, STREAMING]


def check_policy(name: str) -> None:
    """Refuse a name that there is no policy of.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in policy_names():
        raise UsageError(f"no policy named {name!r}; there are: {', '.join(policy_names())}")
