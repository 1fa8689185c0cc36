"""SmoothQuant (arXiv 2211.10438): part of what activations vary goes into the weights.

A row of activations rounded to eight bits has one scale, so a channel that is a hundred times the
others leaves these nothing. Dividing every channel by a factor and multiplying its weights by the
same leaves the products as they are and both sides easy to round. The division costs nothing: it
goes into whatever made the channel, a norm's weight or a product's row.
"""

import torch

_SHARE = 0.6  # of an activation's range that goes to the weight; of 0.4 to 0.7 the best here
_LEAST = 1e-5  # a channel that was never seen
_ROWS = 128  # at a time: they stay in the caches, and torch is slow at two dtypes in one operation


def channel_factors(peaks: torch.Tensor, weight_peaks: torch.Tensor) -> torch.Tensor:
    """What each channel is to be divided by.

    Args:
        peaks: the largest activation seen, without sign, float32 [channels].
        weight_peaks: the largest weight, the same.

    Returns:
        float32 [channels], around 1.
    """
    seen, weights = peaks.clamp(min=_LEAST), weight_peaks.clamp(min=_LEAST)
    factors = seen**_SHARE / weights ** (1 - _SHARE)
    return factors / factors.mean()


def column_peaks(x: torch.Tensor) -> torch.Tensor:
    """The largest of each column of x [rows, columns], without sign, float32 [columns]."""
    peaks = torch.zeros(x.shape[1], dtype=x.dtype)
    for rows in torch.split(x, _ROWS):
        peaks = torch.maximum(peaks, rows.abs().amax(dim=0))
    return peaks.float()


def multiply_columns(weight: torch.Tensor, factors: torch.Tensor) -> None:
    """Weight [rows, columns] times factors, float32 [columns], in place."""
    for rows in torch.split(weight, _ROWS):
        rows.copy_(rows.float().mul_(factors))


def divide_rows(weight: torch.Tensor, factors: torch.Tensor) -> None:
    """Weight [rows, columns] by factors, float32 [rows], in place."""
    for rows, divisors in zip(torch.split(weight, _ROWS), torch.split(factors, _ROWS), strict=True):
        rows.copy_(rows.float().div_(divisors[:, None]))
