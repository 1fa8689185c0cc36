"""A backend that sees keys and values as a cache of eight bits would keep them.

It saves no memory: it is what a kernel with such a cache is held against, and how what such a cache
costs in quality is measured where there is no such kernel.
"""

from dataclasses import dataclass

import torch

from batchllm.attention.backend import AttentionBackend, LayerPlan
from batchllm.models.linear import round_to_int8
from batchllm.models.rope import Rotation
from batchllm.runner.model_input import ModelInput
from batchllm.runner.staging import Put

_FLOAT8 = torch.float8_e4m3fn


def round_rows(rows: torch.Tensor, kv_dtype: torch.dtype) -> torch.Tensor:
    """Rows [..., head_dim] to what is read back of them, float32.

    float8_e4m3fn has no scale and ends at 448; int8 has a scale for each row.
    """
    if kv_dtype == _FLOAT8:
        most = torch.finfo(_FLOAT8).max
        return rows.float().clamp(-most, most).to(_FLOAT8).float()
    assert kv_dtype == torch.int8, kv_dtype
    rounded, scales = round_to_int8(rows.flatten(0, -2))
    return (rounded.float() * scales[:, None]).view(rows.shape)


class RoundedBackend:
    """Rotates, rounds keys and values, and leaves the rest to `backend`, in its cache's dtype."""

    def __init__(self, backend: AttentionBackend, kv_dtype: torch.dtype) -> None:
        self.name = f"{backend.name}, KV rounded to {kv_dtype}".replace("torch.", "")
        self.granularity = backend.granularity
        self._backend = backend
        self._kv_dtype = kv_dtype

    def plan(
        self, step: ModelInput, rotation: Rotation, put: Put = torch.from_numpy
    ) -> "RoundedPlan":
        """See `AttentionBackend`."""
        none = Rotation(torch.ones_like(rotation.cos), torch.zeros_like(rotation.sin))
        return RoundedPlan(self._backend.plan(step, none, put), rotation, self._kv_dtype)


@dataclass(frozen=True, slots=True)
class RoundedPlan:
    """A step of it."""

    plan: LayerPlan
    rotation: Rotation
    kv_dtype: torch.dtype

    def run(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `LayerPlan.run`."""
        num_kv_heads = keys.shape[2]
        num_heads = qkv.shape[1] - 2 * num_kv_heads
        query, key, value = torch.split(qkv, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        key = round_rows(self.rotation.apply(key.float()), self.kv_dtype)
        seen = [self.rotation.apply(query), key, round_rows(value, self.kv_dtype)]
        return self.plan.run(torch.cat([x.to(keys.dtype) for x in seen], dim=1), keys, values)
