"""Greedy and random sampling of a step's logits."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from batchllm.request import SamplingParams, TokenIds
from batchllm.sampling.random import uniform
from batchllm.scheduler.batch import NO_TOKEN, Samples

_FIRST_LOOK = 1024  # candidates sorted before the whole vocabulary is


def sample_tokens(
    logits: torch.Tensor, samples: Samples, argmax: Callable[[torch.Tensor], torch.Tensor]
) -> TokenIds:
    """One token for each row of `logits` [num_samples, vocab_size], int32 [num_samples].

    Greedy rows take the first largest logit, which `argmax` finds (see `Operations`). The others
    are filtered as Hugging Face and vLLM do, temperature, then top-k, then top-p, and drawn by
    inverting the cumulative distribution at one uniform number that depends on the row's seed, its
    index and the output position alone. Greedy or not, a row in which `argmax` finds none, for a
    NaN or because the largest is infinite, gets `NO_TOKEN`.
    """
    tokens: TokenIds = argmax(logits).numpy().astype(np.int32)
    used, which = np.unique(samples.params_index, return_inverse=True)
    params = [samples.params[i] for i in used]
    random = ~np.array([p.greedy for p in params], dtype=np.bool_)[which]
    drawn = np.flatnonzero(random & (tokens != NO_TOKEN))
    if len(drawn):
        each = [params[i] for i in which[drawn]]
        numbers = uniform(
            np.array([p.seed for p in each], dtype=np.int64),
            samples.row_index[drawn],
            samples.output_position[drawn],
        )
        tokens[drawn] = _draw(logits[torch.from_numpy(drawn)].float(), each, numbers).numpy()
    return tokens


def _draw(
    logits: torch.Tensor, params: list[SamplingParams], draws: NDArray[np.float64]
) -> torch.Tensor:
    vocab_size = logits.shape[-1]
    logits = logits / torch.tensor([p.temperature for p in params])[:, None]
    top_k = torch.tensor([min(p.top_k, vocab_size) or vocab_size for p in params])
    top_p = torch.tensor([p.top_p for p in params])
    numbers = torch.from_numpy(draws)
    filtered = (top_k < vocab_size) | (top_p < 1)
    tokens = torch.empty(len(params), dtype=torch.int64)
    for rows in ((~filtered).nonzero().squeeze(1), filtered.nonzero().squeeze(1)):
        if len(rows) == 0:
            continue
        if filtered[rows[0]]:
            tokens[rows] = _draw_filtered(logits[rows], top_k[rows], top_p[rows], numbers[rows])
        else:
            tokens[rows] = _invert(torch.softmax(logits[rows], dim=-1), numbers[rows])
    return tokens


def _draw_filtered(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, numbers: torch.Tensor
) -> torch.Tensor:
    """Sort as many candidates as the filters can keep, then draw among them."""
    vocab_size = logits.shape[-1]
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    look = min(_FIRST_LOOK, vocab_size)
    values, order = logits.topk(look, dim=-1)
    covered = (values - total).exp().sum(dim=-1)
    unsure = (top_k > look) & ((top_k < vocab_size) | (covered < top_p))
    tokens = torch.empty(len(logits), dtype=torch.int64)
    # What is drawn for a row must not depend on which others there are, so each gets its own way.
    for rows in ((~unsure).nonzero().squeeze(1), unsure.nonzero().squeeze(1)):
        if len(rows) == 0:
            continue
        best, which = values[rows], order[rows]
        if unsure[rows[0]]:
            best, which = logits[rows].sort(dim=-1, descending=True, stable=True)
        tokens[rows] = _draw_among(
            best, which, total[rows], top_k[rows], top_p[rows], numbers[rows]
        )
    return tokens


def _draw_among(
    values: torch.Tensor,
    order: torch.Tensor,
    total: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    numbers: torch.Tensor,
) -> torch.Tensor:
    """Draw among candidates, the likeliest first; `total` is the log-sum-exp of all there are."""
    ranks = torch.arange(values.shape[-1])
    values = values.masked_fill(ranks >= top_k[:, None], -torch.inf)
    # Where the candidates are but a part of what top-k keeps, weigh them by the whole.
    whole = torch.where(
        (top_k <= values.shape[-1])[:, None], torch.logsumexp(values, dim=-1, keepdim=True), total
    )
    weights = (values - whole).exp()
    before = weights.cumsum(dim=-1) - weights
    weights = weights.masked_fill(before >= top_p[:, None], 0.0)
    return order.gather(-1, _invert(weights, numbers)[:, None]).squeeze(-1)


def _invert(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Index at which each row's running sum passes its number's share of the total."""
    running = weights.double().cumsum(dim=-1)
    wanted = numbers[:, None] * running[:, -1:]
    index = torch.searchsorted(running, wanted, right=True).squeeze(-1)
    return index.clamp(max=weights.shape[-1] - 1)
