"""SmoothQuant (arXiv 2211.10438): part of what activations vary goes into the weights.

A row of activations rounded to eight bits has one scale, so a channel that is a hundred times the
others leaves these nothing. Dividing every channel by a factor and multiplying its weights by the
same leaves the products as they are and both sides easy to round. The division costs nothing: it
goes into whatever made the channel, a norm's weight or a product's row.
"""

import torch

_SHARE = 0.6  # of an activation's range that goes to the weight; of 0.4 to 0.7 the best here
_LEAST = 1e-5  # a channel that was never seen


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
