"""What an attention backend is, and which there are."""

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

import torch

from batchllm.errors import UsageError
from batchllm.models.rope import Rotation
from batchllm.runner.model_input import ModelInput


class LayerPlan(Protocol):
    """A step's attention, planned; run once for each layer."""

    def run(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Rotate queries and keys, write keys and values to the cache, attend.

        Args:
            qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim]: queries, keys, values. May be
                overwritten.
            keys: the layer's cache, [num_blocks, block_size, num_kv_heads, head_dim]. Where in its
                block a value lies is the backend's own affair.
            values: the same.

        Returns:
            [num_tokens, num_heads * head_dim], in the dtype of `qkv`.
        """
        ...


class AttentionBackend(Protocol):
    """Plans once a step, whatever the number of layers.

    `name` is for people. Segments must begin at multiples of `granularity`.
    """

    name: str
    granularity: int

    def plan(self, step: ModelInput, rotation: Rotation) -> LayerPlan:
        """Turn a step's items into what `run` needs, so that no layer does index work."""
        ...


_HOMES = {
    "reference": ("batchllm.attention.reference", "ReferenceBackend"),
    "torch": ("batchllm.attention.cascade", "TorchBackend"),
    "native": ("batchllm.attention.native", "NativeBackend"),
}


def backend_names() -> list[str]:
    """All names `make_backend` knows, `auto` included."""
    return ["auto", *_HOMES]


def make_backend(
    name: str, block_size: int, head_dim: int, *, deterministic: bool = False
) -> AttentionBackend:
    """Create a backend by name; `auto` is the fastest that runs here with these sizes.

    A `deterministic` one computes the same to the last bit however contexts are cut into segments.

    Raises:
        UsageError: there is none of that name, or it cannot run here, or is not deterministic.
    """
    if name not in backend_names():
        raise UsageError(
            f"no attention backend named {name!r}; there are: {', '.join(backend_names())}"
        )
    if deterministic:
        return _make_deterministic(name, block_size, head_dim)
    if name == "auto":
        name = "torch" if why_not_native(block_size, head_dim) else "native"
    return _make(name, block_size, head_dim)


def _make_deterministic(name: str, block_size: int, head_dim: int) -> AttentionBackend:
    why_not = why_not_native(block_size, head_dim)
    if name not in ("auto", "native"):
        why_not = f"the attention backend is {name}"
    if why_not:
        raise UsageError(f"deterministic needs the compiled kernels: {why_not}")
    from batchllm.attention.native import NativeBackend

    return NativeBackend(block_size, head_dim, deterministic=True)


def why_not_native(block_size: int, head_dim: int) -> str | None:
    """What keeps the compiled kernels from running here; None if nothing does."""
    try:
        _make("native", block_size, head_dim)
    except UsageError as error:
        return str(error)
    return None


def _make(name: str, block_size: int, head_dim: int) -> AttentionBackend:
    module, cls = _HOMES[name]
    factory: Callable[[int, int], AttentionBackend] = getattr(import_module(module), cls)
    return factory(block_size, head_dim)
