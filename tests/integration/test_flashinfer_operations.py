"""What FlashInfer computes beside attention, by a plain reading of its documentation."""

from types import SimpleNamespace

import flashinfer_reading
import numpy as np
import pytest
import torch
from sampling import make_samples

from batchllm.models.flashinfer_operations import FlashInferOperations
from batchllm.models.operations import TorchOperations
from batchllm.request import SamplingParams
from batchllm.sampling.flashinfer_draw import FlashInferDraw
from batchllm.sampling.sampler import draw_all_sorted, put_draws, sample_on_device
from batchllm.scheduler.batch import NO_TOKEN

OPERATIONS = FlashInferOperations(TorchOperations(), flashinfer_reading)
OLD = SimpleNamespace(**vars(flashinfer_reading))
OLD.top_p_renorm_probs = flashinfer_reading.top_p_renorm_probs_of_0_6_4


def noise(*shape, seed=0, dtype=torch.bfloat16):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("with_delta", [False, True])
def test_rms_norm_adds_in_place_and_equals_torch(rows, with_delta, dtype):
    hidden, weight = noise(rows, 48, dtype=dtype), noise(48, seed=1, dtype=dtype)
    delta = noise(rows, 48, seed=2, dtype=dtype) if with_delta else None
    exact = hidden.clone()
    expected = TorchOperations().add_rms_norm(
        exact, None if delta is None else delta.clone(), weight, 1e-5
    )
    got = OPERATIONS.add_rms_norm(hidden, delta, weight, 1e-5)
    assert torch.equal(hidden, exact)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=2e-2)


@pytest.mark.parametrize("rows", [0, 5])
def test_gate_equals_torch(rows):
    gate_up = noise(rows, 96)
    expected = TorchOperations().silu_and_multiply(gate_up.float())
    got = OPERATIONS.silu_and_multiply(gate_up)
    torch.testing.assert_close(got.float(), expected, atol=1e-6, rtol=1e-2)


def sample(logits, each, draw, rows=None):
    samples = make_samples(each, rows)
    draws = put_draws(samples, logits.shape[-1], torch.from_numpy)
    return sample_on_device(logits, draws, TorchOperations().argmax, draw).numpy()


@pytest.mark.parametrize("library", [flashinfer_reading, OLD])
@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.6), (3, 0.6), (12, 0.9)])
def test_filters_keep_what_sorting_keeps(library, top_k, top_p):
    count = 4000
    logits = noise(1, 16, dtype=torch.float32).expand(count, -1)
    params = SamplingParams(temperature=1.7, top_k=top_k, top_p=top_p, seed=5)
    got, expected = (
        np.bincount(sample(logits, [params] * count, draw), minlength=16) / count
        for draw in (FlashInferDraw(library), draw_all_sorted)
    )
    assert ((got > 0) == (expected > 0)).all()
    assert np.abs(got - expected).max() < 0.04


def test_unusable_rows_get_no_token_and_reach_no_kernel_as_nans():
    logits = noise(6, 40, dtype=torch.float32)
    each = [SamplingParams(temperature=1.0, top_k=5, top_p=0.9)] * 6
    good = sample(logits, each, FlashInferDraw(flashinfer_reading))
    logits[1, 7], logits[2], logits[4, 3] = torch.nan, -torch.inf, torch.inf
    got = sample(logits, each, FlashInferDraw(flashinfer_reading))
    assert got[[1, 2, 4]].tolist() == [NO_TOKEN] * 3
    assert got[[0, 3, 5]].tolist() == good[[0, 3, 5]].tolist()


def test_a_row_draws_the_same_whatever_the_batch():
    logits = noise(40, 60, dtype=torch.float32)
    each = [
        SamplingParams(temperature=(i % 4) / 2, top_k=i % 5, top_p=1 - i % 3 / 4) for i in range(40)
    ]
    draw = FlashInferDraw(flashinfer_reading)
    rows = np.arange(40)
    alone = [sample(logits[i : i + 1], each[i : i + 1], draw, rows[i : i + 1])[0] for i in rows]
    assert sample(logits, each, draw, rows).tolist() == alone


@pytest.mark.parametrize("temperatures", [[0.0], [0.0, 1.0]])
def test_sampling_on_a_device_waits_for_nothing(temperatures):
    # On `meta` there are no values: whatever asks for one, or for how many, is refused.
    def put(array):
        return torch.from_numpy(array).to("meta")

    each = [SamplingParams(temperature=temperatures[i % len(temperatures)]) for i in range(6)]
    each += [SamplingParams(temperature=1.0, top_k=3)] * (len(temperatures) - 1)
    draws = put_draws(make_samples(each), 30, put)
    assert len(draws) == 2 * (len(temperatures) - 1)
    tokens = sample_on_device(
        torch.empty(len(each), 30, device="meta"),
        draws,
        TorchOperations().argmax,
        draw_all_sorted,
    )
    assert tokens.device.type == "meta" and tokens.dtype == torch.int32
