"""What an attention backend is, and which there are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from batchllm.errors import UsageError
from batchllm.models.operations import AttentionCalls
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
            keys: the layer's cache, [num_blocks, block_size, num_kv_heads, kv_row_values]. Where a
                value lies is the backend's own affair.
            values: the same.

        Returns:
            [num_tokens, num_heads * head_dim], in the dtype of `qkv`.
        """
        ...


@runtime_checkable
class CompiledPlan(LayerPlan, Protocol):
    """A plan that kernels can run, layer after layer."""

    def run_last(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """As `run`, but of what it returns only the rows to sample need be set."""
        ...

    def calls(
        self, qkv: Sequence[torch.Tensor], keys: torch.Tensor, values: torch.Tensor
    ) -> AttentionCalls:
        """What to call for as many layers as give their `qkv`; the caches are all layers'."""
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
    """A plan for steps whose chunks are of one token each, and whose `run` is recorded.

    For equally many tokens `run` always does the same, and reads what differs between steps from
    places that never move.
    """

    def update(self, step: ModelInput) -> bool:
        """Fill the places for a step; False where it does not fit, and another way must be taken.

        They reach the device before `run` does.
        """
        ...


@runtime_checkable
class GraphBackend(AttentionBackend, Protocol):
    """A backend that can be recorded."""

    def graph_plan(self, max_num_tokens: int, rotation: Rotation, reserve: Reserve) -> GraphPlan:
        """Make the plan for all steps of up to `max_num_tokens` tokens; see `GraphPlan`.

        `rotation` is as long, never moves, and its beginning is filled before each `run`.
        """
        ...


@runtime_checkable
class SharingBackend(GraphBackend, Protocol):
    """A backend that leaves room on the device for what runs beside it."""

    def on_share(self, share: float) -> "SharingBackend":
        """The same on this share of the device. Plans of several may exist at the same time."""
        ...


@dataclass(frozen=True, slots=True)
class Heads:
    """A model's heads, or those of them that are computed here."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads a kv head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a backend's factory is, and which devices it runs on.

    One that `takes_heads` is told them, and what its cache is to be of.
    """

    module: str
    factory: str
    devices: tuple[str, ...] = ("cpu",)
    takes_heads: bool = False


_HOMES = {
    "reference": _Home("batchllm.attention.reference", "ReferenceBackend", ("cpu", "cuda")),
    "torch": _Home("batchllm.attention.cascade", "TorchBackend"),
    "native": _Home("batchllm.attention.native", "NativeBackend"),
    "cuda": _Home("batchllm.attention.cuda", "make_cuda", ("cuda",), takes_heads=True),
    "mixed": _Home("batchllm.attention.mixed", "make_mixed", ("cuda",), takes_heads=True),
    **{
        name: _Home("batchllm.attention.flashinfer", factory, ("cuda",), takes_heads=True)
        for name, factory in (("flashinfer", "make_flashinfer"), ("flashinfer-flat", "make_flat"))
    },
}
_FASTEST = {
    "cpu": ("native", "torch"),
    "cuda": ("cuda", "flashinfer"),
}  # `auto` takes the first that runs


def backend_names() -> list[str]:
    """All names `make_backend` knows, `auto` included."""
    return ["auto", *_HOMES]


def make_backend(
    name: str,
    block_size: int,
    head_dim: int,
    *,
    heads: Heads | None = None,
    kv_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    device: str = "cpu",
) -> AttentionBackend:
    """Create a backend by name; `auto` is the fastest that runs on the device with these sizes.

    `kv_dtype` is what keys and values are kept in, if not in the model's dtype. A
    `deterministic` one computes the same to the last bit however contexts are cut into segments.

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
        return _make_fastest(block_size, head_dim, heads, kv_dtype, device)
    if device not in _HOMES[name].devices:
        raise UsageError(f"attention backend {name!r} does not run on device {device!r}")
    return _make(name, block_size, head_dim, heads, kv_dtype)


def _make_fastest(
    block_size: int,
    head_dim: int,
    heads: Heads | None,
    kv_dtype: torch.dtype | None,
    device: str,
) -> AttentionBackend:
    reasons = []
    for name in _FASTEST[device]:
        try:
            return _make(name, block_size, head_dim, heads, kv_dtype)
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


def _make(
    name: str,
    block_size: int,
    head_dim: int,
    heads: Heads | None = None,
    kv_dtype: torch.dtype | None = None,
) -> AttentionBackend:
    home = _HOMES[name]
    factory: Callable[..., AttentionBackend] = getattr(import_module(home.module), home.factory)
    if home.takes_heads:
        return factory(block_size, heads, kv_dtype)
    if kv_dtype is not None:
        raise UsageError(f"attention backend {name!r} keeps KV in the model's dtype")
    return factory(block_size, head_dim)
