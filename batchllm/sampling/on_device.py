"""Sampling without the host: what is drawn for whom is known before, the logits never leave."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from batchllm.sampling.random import uniform
from batchllm.scheduler.batch import NO_TOKEN, Samples

Put = Callable[[NDArray[Any]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class DrawnRows:
    """Rows that are drawn at random in one way, all [n], on the device.

    `rows` int64 are their places among the step's samples; `temperatures`, `top_ps` float32 and
    `top_ks` int64 [n, 1]; `numbers` float64 [n, 1] in [0, 1) are what each is drawn by.
    """

    rows: torch.Tensor
    temperatures: torch.Tensor
    top_ks: torch.Tensor
    top_ps: torch.Tensor
    numbers: torch.Tensor


@dataclass(frozen=True, slots=True)
class Draws:
    """Who is drawn at random, among all likely tokens or from the whole vocabulary."""

    filtered: DrawnRows | None
    whole: DrawnRows | None


def put_draws(samples: Samples, vocab_size: int, put: Put) -> Draws:
    """Send what samples are drawn by on its way."""
    used, which = np.unique(samples.params_index, return_inverse=True)
    params = [samples.params[i] for i in used]
    random = ~np.array([p.greedy for p in params], dtype=np.bool_)[which]
    if not random.any():
        return Draws(None, None)
    top_k = np.array([min(p.top_k, vocab_size) or vocab_size for p in params], np.int64)[which]
    top_p = np.array([p.top_p for p in params], np.float32)[which]
    temperature = np.array([p.temperature for p in params], np.float32)[which]
    seeds = np.array([p.seed for p in params], np.int64)[which]
    numbers = uniform(seeds, samples.row_index, samples.output_position)
    is_filtered = (top_k < vocab_size) | (top_p < 1)

    def put_rows(chosen: NDArray[np.bool_]) -> DrawnRows | None:
        rows = chosen.nonzero()[0]
        if len(rows) == 0:
            return None
        each = (temperature, top_k, top_p, numbers)
        return DrawnRows(put(rows), *[put(values[rows][:, None]) for values in each])

    return Draws(filtered=put_rows(random & is_filtered), whole=put_rows(random & ~is_filtered))


def sample_on_device(
    logits: torch.Tensor, draws: Draws, argmax: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """One token for each row of `logits` [num_samples, vocab_size], int32 [num_samples].

    What `sample_tokens` says of its results holds here, but for where they are.
    """
    tokens = argmax(logits).to(torch.int32)
    for drawn, draw in ((draws.filtered, _draw_filtered), (draws.whole, _draw_whole)):
        if drawn is not None:
            greedy = tokens.index_select(0, drawn.rows)
            chosen = logits.index_select(0, drawn.rows).float() / drawn.temperatures
            random = draw(chosen, drawn).to(torch.int32)
            tokens.index_copy_(0, drawn.rows, torch.where(greedy == NO_TOKEN, greedy, random))
    return tokens


def _draw_whole(logits: torch.Tensor, drawn: DrawnRows) -> torch.Tensor:
    return _invert(torch.softmax(logits, dim=-1), drawn.numbers)


def _draw_filtered(logits: torch.Tensor, drawn: DrawnRows) -> torch.Tensor:
    """Among the likeliest; all are sorted, since how many are enough only the device knows."""
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(values.shape[-1], device=values.device)
    weights = torch.softmax(values.masked_fill(ranks >= drawn.top_ks, -torch.inf), dim=-1)
    before = weights.cumsum(dim=-1) - weights
    weights = weights.masked_fill(before >= drawn.top_ps, 0.0)
    return order.gather(-1, _invert(weights, drawn.numbers)[:, None]).squeeze(-1)


def _invert(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Index at which each row's running sum passes its number's share of the total."""
    running = weights.double().cumsum(dim=-1)
    index = torch.searchsorted(running, numbers * running[:, -1:], right=True).squeeze(-1)
    return index.clamp(max=weights.shape[-1] - 1)
