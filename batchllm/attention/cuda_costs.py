"""What the `cuda` kernel's units cost on the chip at hand, from a few steps' times.

Only ratios matter: whether a shared segment is read apart, and how far long units are cut, are
choices between units. So the steps are made to consist of one kind of unit each, and long enough
for launches not to count.
"""

from collections.abc import Callable

import numpy as np

from batchllm.attention.cuda_plan import LARGE_ROWS, UnitCosts
from batchllm.attention.sample_items import grouped, lone
from batchllm.runner.model_input import AttentionItems

TimeStep = Callable[[AttentionItems, int, UnitCosts], float]
"""(items, queries, costs to plan with) to the seconds that attention takes."""

_NEVER = 1e9
_ALONG = UnitCosts(partial_row=_NEVER, least_keys=1 << 30)  # nothing apart, nothing cut
_APART = UnitCosts(partial_row=0.0, unit=0.0, least_keys=1 << 30)
_LONG, _SHORT = 1024, 128  # keys
_RANGES = ((0.25, 8.0), (4.0, 1024.0), (0.25, 64.0))  # large_key, unit, partial_row


def measure_costs(
    time_step: TimeStep, *, group: int, num_kv_heads: int, num_blocks: int, block_size: int
) -> UnitCosts:
    """Costs of units for a model with `group` query heads a kv head.

    `num_blocks` is how many blocks the device holds at once. What comes out is kept within sane
    bounds: a wrong crossover costs time, never a wrong answer.
    """
    count = 4 * num_blocks // num_kv_heads + 1
    size = max(1, LARGE_ROWS // group)

    def alone(queries: int, keys: int) -> float:
        return time_step(lone(queries, 1, keys, block_size), queries, _ALONG)

    def shared(groups: int, keys: int) -> float:
        return time_step(grouped(groups, size, 1, keys, block_size), groups * size, _APART)

    short = alone(count, _SHORT)
    small = (alone(count, _LONG) - short) / (_LONG - _SHORT) / count
    if small <= 0:
        return UnitCosts()
    # What a launch costs is in all times, so only differences are used.
    unit = (alone(2 * count, _SHORT) - short) / count - _SHORT * small
    groups = max(1, count // 2)
    some = shared(groups, _LONG)
    large = (shared(groups, 2 * _LONG) - some) / _LONG / groups
    # Twice as many groups are as many more large units, and small ones of a key, all merged.
    more = (shared(2 * groups, _LONG) - some) / groups
    merged = more - large * _LONG - unit - size * (small + unit)
    low, high = zip(*_RANGES, strict=True)
    found = np.clip([large / small, unit / small, merged / small / (size * group)], low, high)
    return UnitCosts(large_key=float(found[0]), unit=float(found[1]), partial_row=float(found[2]))
