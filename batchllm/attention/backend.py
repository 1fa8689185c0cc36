"""What an attention backend is, and which there are."""

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

import torch

from batchllm.errors import UsageError
from batchllm.runner.model_input import AttentionItems


class LayerPlan(Protocol):
    """A step's attention, planned; run once for each layer."""

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [num_tokens, num_heads, head_dim].
            key: this step's keys, [num_tokens, num_kv_heads, head_dim]; in the cache already.
            value: this step's values, the same shape.
            key_cache: the layer's, [num_blocks, block_size, num_kv_heads, head_dim].
            value_cache: the same shape.

        Returns:
            [num_tokens, num_heads, head_dim], in the query's dtype.
        """
        ...


class AttentionBackend(Protocol):
    """Plans once a step, whatever the number of layers."""

    def plan(self, items: AttentionItems, num_tokens: int) -> LayerPlan:
        """Turn a step's items into what `run` needs, so that no layer does index work."""
        ...


_HOMES = {
    "reference": ("batchllm.attention.reference", "ReferenceBackend"),
    "cpu": ("batchllm.attention.cpu", "CpuBackend"),
}


def backend_names() -> list[str]:
    """All names `make_backend` knows, `auto` included."""
    return ["auto", *_HOMES]


def make_backend(name: str, block_size: int) -> AttentionBackend:
    """Create a backend by name; `auto` is the fastest for the device.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in backend_names():
        raise UsageError(
            f"no attention backend named {name!r}; there are: {', '.join(backend_names())}"
        )
    module, cls = _HOMES["cpu" if name == "auto" else name]
    factory: Callable[[int], AttentionBackend] = getattr(import_module(module), cls)
    return factory(block_size)
