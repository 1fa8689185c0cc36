"""What an attention backend is, and which there are."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from batchllm.errors import UsageError
from batchllm.models.rope import Rotation
from batchllm.runner.model_input import ModelInput
from batchllm.runner.staging import Place, Put

Reserve = Callable[[int, type[np.generic]], Place]
"""(size, numpy's type) to a place on the device; see `FixedStager.reserve`."""


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

    def plan(self, step: ModelInput, rotation: Rotation, put: Put = torch.from_numpy) -> LayerPlan:
        """Turn a step's items into what `run` needs, so that no layer does index work.

        Arrays that are needed on the device go there by `put`. What it returns, and `rotation`, may
        be filled only after this: they must not be looked at before `run`.
        """
        ...


class GraphPlan(LayerPlan, Protocol):
    """A plan for many steps of as many one-token chunks each, whose `run` is recorded.

    So `run` does the same for each of them, and reads what differs from places that never move.
    """

    def update(self, step: ModelInput) -> bool:
        """Fill the places for a step; False where it does not fit, and another way must be taken.

        They reach the device before `run` does. As many tokens as planned for are in the step, all
        of them chunks of one token.
        """
        ...


@runtime_checkable
class GraphBackend(AttentionBackend, Protocol):
    """A backend that can be recorded."""

    def graph_plan(self, num_tokens: int, rotation: Rotation, reserve: Reserve) -> GraphPlan:
        """Plan for steps of `num_tokens`; see `GraphPlan`.

        `rotation` never moves and is filled before each `run`. Of several plans only one is updated
        and run at a time, so they may share their places.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a backend's class is, and which devices it runs on."""

    module: str
    cls: str
    devices: tuple[str, ...] = ("cpu",)


_HOMES = {
    "reference": _Home("batchllm.attention.reference", "ReferenceBackend", ("cpu", "cuda")),
    "torch": _Home("batchllm.attention.cascade", "TorchBackend"),
    "native": _Home("batchllm.attention.native", "NativeBackend"),
}
_FASTEST: dict[str, tuple[str, ...]] = {"cpu": ("native", "torch"), "cuda": ()}  # first comes first


def backend_names() -> list[str]:
    """All names `make_backend` knows, `auto` included."""
    return ["auto", *_HOMES]


def make_backend(
    name: str, block_size: int, head_dim: int, *, deterministic: bool = False, device: str = "cpu"
) -> AttentionBackend:
    """Create a backend by name; `auto` is the fastest that runs on the device with these sizes.

    A `deterministic` one computes the same to the last bit however contexts are cut into segments.

    Raises:
        UsageError: there is none of that name, or it cannot run here, or is not deterministic.
    """
    if name not in backend_names():
        raise UsageError(
            f"no attention backend named {name!r}; there are: {', '.join(backend_names())}"
        )
    if deterministic:
        return _make_deterministic(name, block_size, head_dim, device)
    if name == "auto":
        return _make_fastest(block_size, head_dim, device)
    if device not in _HOMES[name].devices:
        raise UsageError(f"attention backend {name!r} does not run on device {device!r}")
    return _make(name, block_size, head_dim)


def _make_fastest(block_size: int, head_dim: int, device: str) -> AttentionBackend:
    reasons = []
    for name in _FASTEST[device]:
        try:
            return _make(name, block_size, head_dim)
        except UsageError as error:
            reasons.append(f"; {name}: {error}")
    raise UsageError(
        f"no fast attention runs on device {device!r}{''.join(reasons)}; "
        "take --device cpu, or the attention backend 'reference', which is very slow"
    )


def _make_deterministic(name: str, block_size: int, head_dim: int, device: str) -> AttentionBackend:
    why_not = why_not_native(block_size, head_dim)
    if device != "cpu":
        why_not = "they run on the CPU; add --device cpu"
    elif name not in ("auto", "native"):
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
    home = _HOMES[name]
    factory: Callable[[int, int], AttentionBackend] = getattr(import_module(home.module), home.cls)
    return factory(block_size, head_dim)
