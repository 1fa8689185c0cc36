"""Random weights for a model's tensors, as fast as memory is written.

Drawing eight billion numbers takes minutes. So a few million are drawn, and each tensor is that run
of numbers over and over, from a place of its own on. Their count is a prime, so that the rows of a
tensor all begin at different places: some are others shifted, none are equal, and products with
them are as those with independent ones.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from batchllm.models.layout import Shape

_COUNT = 3_300_001
# Scores of queries and keys then vary by about 2, so that attention looks at some tens of a few
# thousand tokens, and not at all of them alike or at one.
_QUERY_KEY_GAIN = math.sqrt(2)
_BIAS_SCALE = 0.5


def random_tensors(
    shapes: Mapping[str, Shape], dtype: torch.dtype, seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of a model by name, always the same for a seed, on torch's default device.

    Weights are normal with a deviation of about 1 / sqrt(inputs), so that what goes through a layer
    keeps its size; norms are 1. No more is held than the tensor that is yielded and a few MB.
    """
    generator = np.random.default_rng(seed)
    drawn = torch.from_numpy(generator.standard_normal(_COUNT, dtype=np.float32))
    drawn = drawn.to(torch.get_default_device(), dtype)
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, dtype=dtype)
        else:
            start = int(generator.integers(_COUNT))
            yield name, _tiled(drawn, start, math.prod(shape), _scale(name, shape)).view(shape)


def _scale(name: str, shape: Shape) -> float:
    if name.endswith("bias"):
        return _BIAS_SCALE
    gain = _QUERY_KEY_GAIN if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
    return gain / math.sqrt(shape[-1])


def _tiled(drawn: torch.Tensor, start: int, count: int, scale: float) -> torch.Tensor:
    """`count` numbers of `drawn` repeated without end, from `start` on, times `scale`."""
    out = drawn.new_empty(count)
    begun = min(count, len(drawn) - start)
    times = (count - begun) // len(drawn)
    whole = begun + times * len(drawn)
    torch.mul(drawn[start : start + begun], scale, out=out[:begun])
    rounds = out[begun:whole].view(times, len(drawn))
    torch.mul(drawn.expand(times, -1), scale, out=rounds)
    torch.mul(drawn[: count - whole], scale, out=out[whole:])
    return out
