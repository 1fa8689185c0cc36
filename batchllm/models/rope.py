"""Rotary position embeddings."""

import math

import torch

from batchllm.models.config import ModelConfig, RopeScaling


class RotaryEmbedding:
    """Rotates pairs (i, i + head_dim / 2) by position times frequency, as Hugging Face lays out."""

    def __init__(self, config: ModelConfig) -> None:
        self._frequencies = rope_frequencies(config)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [num_tokens, 1, head_dim / 2], float32, of int64 positions."""
        angles = positions[:, None, None].float() * self._frequencies
        return angles.cos(), angles.sin()

    def rotate(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate [num_tokens, heads, head_dim]; the cosines and sines are this object's own."""
        cos, sin = cos.to(states.dtype), sin.to(states.dtype)
        left, right = states.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def rope_frequencies(config: ModelConfig) -> torch.Tensor:
    """Radians a position, [head_dim / 2], float32, stretched as the config asks."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequencies = config.rope_theta ** -(half / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _llama3(frequencies, scaling)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Slow low frequencies down by `factor`, keep high ones, blend between (Llama 3.1)."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)
