"""Rotary position embeddings."""

import math
from dataclasses import dataclass

import torch

from batchllm.models.config import ModelConfig, RopeScaling


@dataclass(frozen=True, slots=True)
class Rotation:
    """How a step's queries and keys are rotated: `cos` and `sin`, float32 [num_tokens, d / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor

    def first(self, num_tokens: int) -> "Rotation":
        """That of the first tokens, in the same memory."""
        return Rotation(self.cos[:num_tokens], self.sin[:num_tokens])

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        """Rotate [num_tokens, heads, d], pairs (i, i + d / 2) as Hugging Face lays them out.

        In float32, rounded once.
        """
        cos, sin = self.cos[:, None], self.sin[:, None]
        left, right = states.float().chunk(2, dim=-1)
        rotated = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
        return rotated.to(states.dtype)


class RotaryEmbedding:
    """Angles are position times frequency."""

    def __init__(self, config: ModelConfig) -> None:
        self._frequencies = rope_frequencies(config)

    def __call__(self, positions: torch.Tensor) -> Rotation:
        """The rotation of tokens at `positions`, int64 [num_tokens]."""
        rotation = self.empty(len(positions))
        self.fill(rotation, positions)
        return rotation

    def empty(self, num_tokens: int) -> Rotation:
        """Room for a rotation, for who must know where it will be before `fill` can say what."""
        shape = (num_tokens, len(self._frequencies))
        return Rotation(*[self._frequencies.new_empty(shape) for _ in range(2)])

    def fill(self, rotation: Rotation, positions: torch.Tensor) -> None:
        """Write the rotation of tokens at `positions`, int64 [num_tokens]."""
        angles = positions[:, None].float() * self._frequencies
        torch.cos(angles, out=rotation.cos)
        torch.sin(angles, out=rotation.sin)


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
