"""Greedy and random sampling of a step's logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from batchllm.sampling.random import uniform
from batchllm.scheduler.batch import NO_TOKEN, Samples

Argmax = Callable[[torch.Tensor], torch.Tensor]
"""The first largest of each row, an integer [rows]; -1 where there is none; see `Operations`."""

Put = Callable[[NDArray[Any]], torch.Tensor]
"""An array to a tensor on the device where the logits will be."""

_FIRST_LOOK = 1024  # candidates sorted before the whole vocabulary is


@dataclass(frozen=True, slots=True)
class Draws:
    """Samples of a step that are drawn at random and filtered alike, on the logits' device.

    All are [n]: `rows` int64, which of the samples they are; `temperature` float32; `numbers`
    float64, one in [0, 1) for each, to draw by; `top_k` int32 and `top_p` float32, or None where
    there is no such filter.
    """

    rows: torch.Tensor
    temperature: torch.Tensor
    numbers: torch.Tensor
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None


Draw = Callable[[torch.Tensor, Draws], torch.Tensor]
"""Draw a token, int64 [n], for each row of logits [n, vocab_size], already divided by temperature.

`top_k` then `top_p` tell which may be drawn; a row with NaNs gets any.
"""


def put_draws(samples: Samples, vocab_size: int, put: Put) -> list[Draws]:
    """What is drawn in a step, put on its way to the device: nothing where all rows are greedy.

    How a row is drawn never depends on which others there are, so those that are filtered otherwise
    are apart.
    """
    if all(samples.params[i].greedy for i in set(samples.params_index.tolist())):
        return []
    used, which = np.unique(samples.params_index, return_inverse=True)
    params = [samples.params[i] for i in used]
    random = np.flatnonzero(~np.array([p.greedy for p in params], dtype=np.bool_)[which])
    which = which[random]
    numbers = uniform(
        np.array([p.seed for p in params], dtype=np.int64)[which],
        samples.row_index[random],
        samples.output_position[random],
    )
    temperature = np.array([p.temperature for p in params], dtype=np.float32)[which]
    top_p = np.array([p.top_p for p in params], dtype=np.float32)[which]
    top_k = np.array([min(p.top_k, vocab_size) or vocab_size for p in params], dtype=np.int32)
    top_k = top_k[which]
    by_k, by_p = top_k < vocab_size, top_p < 1
    draws = []
    for has_top_k, has_top_p in ((False, False), (True, False), (False, True), (True, True)):
        alike = (by_k == has_top_k) & (by_p == has_top_p)
        if alike.any():
            draws.append(
                Draws(
                    rows=put(random[alike]),
                    temperature=put(temperature[alike]),
                    numbers=put(numbers[alike]),
                    top_k=put(top_k[alike]) if has_top_k else None,
                    top_p=put(top_p[alike]) if has_top_p else None,
                )
            )
    return draws


def sample_on_device(
    logits: torch.Tensor, draws: list[Draws], argmax: Argmax, draw: Draw
) -> torch.Tensor:
    """One token for each row of `logits` [num_samples, vocab_size], int32 on their device.

    Greedy rows take the first largest logit, which `argmax` finds. The others are filtered as
    Hugging Face and vLLM do, temperature, then top-k, then top-p, and drawn by inverting the
    cumulative distribution at one uniform number that depends on the row's seed, its index and the
    output position alone. Greedy or not, a row in which `argmax` finds none, for a NaN or because
    the largest is infinite, gets `NO_TOKEN`.

    The host waits for nothing, unless `draw` does: `draw_sorted` waits, `draw_all_sorted` does not.
    """
    tokens = argmax(logits).to(torch.int32)
    for each in draws:
        chosen = logits.index_select(0, each.rows).float().div_(each.temperature[:, None])
        filtered = each.top_k is not None or each.top_p is not None
        if filtered:
            drawn = draw(chosen, each)
        else:
            drawn = invert(torch.softmax(chosen, dim=-1), each.numbers)
        largest = tokens.index_select(0, each.rows)
        tokens.index_copy_(0, each.rows, drawn.to(torch.int32).where(largest != NO_TOKEN, NO_TOKEN))
    return tokens


def draw_sorted(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Sort as many candidates as the filters can keep, then draw among them; see `Draw`."""
    top_k, top_p = _filters(logits, draws)
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    look = min(_FIRST_LOOK, logits.shape[-1])
    values, order = logits.topk(look, dim=-1)
    covered = (values - total).exp().sum(dim=-1)
    unsure = (top_k > look) & ((top_k < logits.shape[-1]) | (covered < top_p))
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    # What is drawn for a row must not depend on which others there are, so each gets its own way.
    for rows in ((~unsure).nonzero().squeeze(1), unsure.nonzero().squeeze(1)):
        if len(rows) == 0:
            continue
        best, which = values[rows], order[rows]
        if unsure[rows[0]]:
            best, which = logits[rows].sort(dim=-1, descending=True, stable=True)
        tokens[rows] = _draw_among(
            best, which, total[rows], top_k[rows], top_p[rows], draws.numbers[rows]
        )
    return tokens


def draw_all_sorted(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Sort the whole vocabulary: how much of it would do, only the device knows; see `Draw`."""
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    return _draw_among(values, order, total, *_filters(logits, draws), draws.numbers)


def _filters(logits: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k and top-p, [n], also where there is none."""
    top_k, top_p = draws.top_k, draws.top_p
    if top_k is None:
        top_k = torch.full_like(draws.rows, logits.shape[-1])
    if top_p is None:
        top_p = torch.ones_like(draws.temperature)
    return top_k, top_p


def _draw_among(
    values: torch.Tensor,
    order: torch.Tensor,
    total: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    numbers: torch.Tensor,
) -> torch.Tensor:
    """Draw among candidates, the likeliest first; `total` is the log-sum-exp of all there are."""
    ranks = torch.arange(values.shape[-1], device=values.device)
    values = values.masked_fill(ranks >= top_k[:, None], -torch.inf)
    # Where the candidates are but a part of what top-k keeps, weigh them by the whole.
    whole = torch.where(
        (top_k <= values.shape[-1])[:, None], torch.logsumexp(values, dim=-1, keepdim=True), total
    )
    weights = (values - whole).exp()
    before = weights.cumsum(dim=-1) - weights
    weights = weights.masked_fill(before >= top_p[:, None], 0.0)
    return order.gather(-1, invert(weights, numbers)[:, None]).squeeze(-1)


def invert(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Where each row's running sum of weights [n, size] passes its number's share of the total."""
    running = weights.double().cumsum(dim=-1)
    wanted = numbers[:, None] * running[:, -1:]
    index = torch.searchsorted(running, wanted, right=True).squeeze(-1)
    return index.clamp(max=weights.shape[-1] - 1)
