"""What smoothing does to weights a block of rows at a time, against one operation for all."""

import pytest
import torch

from batchllm.models.smoothing import column_peaks, divide_rows, multiply_columns


def weight_of(rows, dtype):
    return torch.randn(rows, 48, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 127, 128, 300])
def test_blocks_of_rows_are_as_all_at_once(rows, dtype):
    weight = weight_of(rows, dtype)
    assert torch.equal(column_peaks(weight), weight.abs().amax(dim=0).float())
    factors = torch.rand(48, generator=torch.Generator().manual_seed(0)) + 0.5
    wanted = weight.clone().mul_(factors)
    multiply_columns(weight, factors)
    assert torch.equal(weight, wanted)
    divisors = torch.rand(rows, generator=torch.Generator().manual_seed(1)) + 0.5
    wanted = weight.clone().div_(divisors[:, None])
    divide_rows(weight, divisors)
    assert torch.equal(weight, wanted)


def test_what_is_no_number_is_a_peak():
    weight = weight_of(300, torch.bfloat16)
    weight[150, 7] = float("nan")
    peaks = column_peaks(weight)
    assert peaks[7].isnan() and peaks.isnan().sum() == 1


def test_a_part_of_a_weight_is_divided_in_place():
    weight = weight_of(200, torch.bfloat16)
    before = weight.clone()
    divide_rows(weight[-150:], torch.full((150,), 2.0))
    assert torch.equal(weight[:50], before[:50])
    assert torch.equal(weight[50:], before[50:] / 2)
