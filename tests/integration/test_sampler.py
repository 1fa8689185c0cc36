"""Sampling against its definition."""

import numpy as np
import pytest
import torch
from sampling import make_samples

from batchllm.models.operations import TorchOperations
from batchllm.request import SamplingParams
from batchllm.sampling import sampler
from batchllm.sampling.random import uniform
from batchllm.scheduler.batch import NO_TOKEN


def samples(count, **params):
    return make_samples([SamplingParams(**params)] * count)


def sample_tokens(logits, samples):
    draws = sampler.put_draws(samples, logits.shape[-1], torch.from_numpy)
    argmax = TorchOperations().argmax
    return sampler.sample_on_device(logits, draws, argmax, sampler.draw_sorted).numpy()


def test_random_numbers_are_uniform_and_independent():
    rows, positions = (a.ravel() for a in np.meshgrid(np.arange(300), np.arange(300)))
    seeds = np.zeros_like(rows)
    numbers = uniform(seeds, rows, positions)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    assert np.abs(counts / len(numbers) * 50 - 1).max() < 0.1
    by_row = numbers.reshape(300, 300)
    for shifted in (by_row[:, 1:] * by_row[:, :-1], by_row[1:] * by_row[:-1]):
        assert abs(shifted.mean() - 0.25) < 0.005
    assert not np.array_equal(numbers, uniform(seeds + 1, rows, positions))
    assert len(np.unique(numbers)) == len(numbers)


def test_greedy_takes_the_largest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 4.0, 5.0]])
    assert sample_tokens(logits, samples(2)).tolist() == [1, 0]


@pytest.mark.parametrize("first_look", [4, 1024])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (3, 0.6), (12, 0.9), (12, 1.0), (1, 1.0)]
)
def test_draws_follow_the_filtered_distribution(monkeypatch, first_look, top_k, top_p):
    monkeypatch.setattr(sampler, "_FIRST_LOOK", first_look)
    count, temperature = 20_000, 1.7
    logits = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 2
    order = logits.argsort(descending=True)
    expected = (logits / temperature)[order]
    expected[top_k or 16 :] = -torch.inf
    expected = expected.softmax(0)
    expected[(expected.cumsum(0) - expected) >= top_p] = 0
    expected /= expected.sum()
    drawn = sample_tokens(
        logits.expand(count, -1),
        samples(count, temperature=temperature, top_k=top_k, top_p=top_p, seed=5),
    )
    share = torch.bincount(torch.from_numpy(drawn), minlength=16)[order] / count
    assert (share[expected == 0] == 0).all()
    torch.testing.assert_close(share, expected.to(share.dtype), atol=0.012, rtol=0)


def test_a_row_draws_the_same_whatever_the_batch():
    torch.manual_seed(0)
    logits = torch.randn(40, 300)
    each = [
        SamplingParams(temperature=(i % 4) / 2, top_k=i % 5, top_p=1 - i % 3 / 4) for i in range(40)
    ]

    def sample(rows):
        chosen = make_samples([each[i] for i in rows], rows, rows % 3)
        return sample_tokens(logits[torch.from_numpy(rows)], chosen).tolist()

    rows = np.arange(40)
    together = sample(rows)
    alone = [sample(rows[i : i + 1])[0] for i in rows]
    backwards = sample(rows[::-1].copy())[::-1]
    assert together == alone == backwards


def test_tiny_temperature_is_nearly_greedy():
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    assert sample_tokens(logits, samples(1, temperature=1e-4)).tolist() == [1]


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"top_p": 0.5}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_usable_logits_get_no_token_and_cost_no_other(params, dtype):
    logits = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    good = sample_tokens(logits, samples(7, **params))
    logits[1, 17] = torch.nan
    logits[2] = torch.nan
    logits[4, 39] = torch.inf
    logits[5] = -torch.inf
    logits[6] = logits[6].masked_fill(logits[6] < logits[6].max(), -torch.inf)
    got = sample_tokens(logits, samples(7, **params))
    assert got[[1, 2, 4, 5]].tolist() == [NO_TOKEN] * 4
    assert got[[0, 3]].tolist() == good[[0, 3]].tolist()
    assert got[6] == logits[6].argmax()


@pytest.mark.parametrize("first_look", [4, 1024])
def test_sorting_all_draws_what_sorting_some_does(monkeypatch, first_look):
    monkeypatch.setattr(sampler, "_FIRST_LOOK", first_look)
    logits = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 3
    each = [SamplingParams(temperature=1.0, top_k=i % 9, top_p=1 - i % 4 / 5) for i in range(200)]
    draws = sampler.put_draws(make_samples(each), 300, torch.from_numpy)
    some, all_ = (
        sampler.sample_on_device(logits, draws, TorchOperations().argmax, draw)
        for draw in (sampler.draw_sorted, sampler.draw_all_sorted)
    )
    assert torch.equal(some, all_)
