"""Costs found again from the times of a device that has them."""

import numpy as np
import pytest

from batchllm.attention.cuda_costs import measure_costs
from batchllm.attention.cuda_plan import NO_PARTIAL, UnitCosts, plan_units

SIZES = {"num_kv_heads": 8, "num_blocks": 396}


def device(truth, group, launch=1e-5, small_key=1e-9):
    """Times steps as units of known cost would take, in small keys, spread over the blocks."""

    def time_step(items, num_queries, costs):
        work = plan_units(items, num_queries, group=group, costs=costs, **SIZES)
        units = work.units.astype(np.int64)
        keys = units[:, 5] - units[:, 4]
        cost = keys * np.where(units[:, 9], 1.0, truth.large_key) + truth.unit
        rows = (units[:, 1] * group)[(units[:, 8] != NO_PARTIAL) & (units[:, 7] == 0)].sum()
        return launch + small_key * (cost.sum() + truth.partial_row * rows)

    return time_step


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize(
    "truth",
    [
        UnitCosts(large_key=1.3, unit=50, partial_row=3),
        UnitCosts(large_key=4, unit=9, partial_row=8),
    ],
)
def test_finds_what_the_device_has(truth, group):
    found = measure_costs(device(truth, group), group=group, block_size=16, **SIZES)
    for name in ("large_key", "unit", "partial_row"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.1), name


def test_noise_stays_within_bounds():
    noise = np.random.default_rng(0)
    for _ in range(20):
        found = measure_costs(lambda *_: float(noise.random()), group=4, block_size=16, **SIZES)
        assert 0.25 <= found.large_key <= 8 and 4 <= found.unit <= 1024
        assert 0.25 <= found.partial_row <= 64
