"""Attention by FlashInfer's kernels: shared segments once for all members, level by level."""

from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import torch

from batchllm.attention.backend import Heads, Reserve
from batchllm.attention.flashinfer_arrays import StepCalls, plan_calls
from batchllm.attention.flashinfer_graph import FlashInferGraphPlan, GraphMemory
from batchllm.attention.flashinfer_wrappers import (
    Computed,
    PlannedCall,
    Wrappers,
    merge_levels,
    plan_decodes,
    plan_prefill,
)
from batchllm.attention.flashinfer_write import Write
from batchllm.errors import UsageError
from batchllm.flashinfer_library import load_flashinfer
from batchllm.models.rope import Rotation
from batchllm.runner.model_input import ModelInput
from batchllm.runner.staging import Put

_HEAD_DIMS = (64, 128, 256)
# A level costs an attention and a merge of all queries: with a thousand of them some 15 µs of an
# H100, in which it could read keys and values of so many tokens (4 KB a layer). To be measured.
_FOLD_BELOW = 8192
_GRAPH_LEVELS = 2  # of steps that are recorded; deeper trees have the rest folded
_FA3_QUERIES = 64  # half a tile of FlashInfer's fa3, which the heads of a group do not share


class FlashInferBackend:
    """Cascade attention in FlashInfer's paged kernels, planned once a step.

    Queries attend to what they have of their own in a call for decodes and one for chunks, then to
    the segments they share in a call a level of the tree; each level is merged by log-sum-exp. That
    is what FlashInfer's `MultiLevelCascadeAttentionWrapper` does, but levels need not cover all
    queries, and decodes do not get the tile size of chunks.

    With `fold_below` infinite there are no levels: each query reads its whole context by itself, in
    pages of one token where segments end within blocks. That is attention without sharing.

    All calls go to torch's current stream and use one workspace, so steps that are to run at the
    same time need a backend each. `kernel` is what FlashInfer is to take where queries are many.

    Raises:
        UsageError: FlashInfer has no kernels for these sizes.
    """

    granularity = 1

    def __init__(
        self,
        block_size: int,
        heads: Heads,
        library: Any,  # noqa: ANN401
        *,
        name: str = "flashinfer",
        fold_below: float = _FOLD_BELOW,
        kernel: str = "auto",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if heads.head_dim not in _HEAD_DIMS:
            raise UsageError(
                f"FlashInfer's kernels need a head_dim of {', '.join(map(str, _HEAD_DIMS))}; it is "
                f"{heads.head_dim}"
            )
        self.name = name
        self.flashinfer = library
        self._computed = Computed(heads, dtype)
        self._block_size = block_size
        self._fold_below = fold_below
        self._kernel = kernel
        self._wrappers: Wrappers | None = None

    def plan(
        self, step: ModelInput, rotation: Rotation, put: Put = torch.from_numpy
    ) -> "FlashInferPlan":
        """See `AttentionBackend`. The plan before can be run until this is called."""
        calls = plan_calls(step.items, len(step.token_ids), self._block_size, self._fold_below)
        wrappers = self._wrappers_on(rotation.cos.device)
        wrappers.copies.wait()
        planned = self._plan(calls, wrappers, put)
        wrappers.copies.mark(rotation.cos.device)
        write = Write(self.flashinfer, put(step.slots.astype(np.int32)))
        return FlashInferPlan(self.flashinfer, planned, write, rotation, self._computed.dtype)

    def graph_plan(
        self, max_num_tokens: int, rotation: Rotation, reserve: Reserve
    ) -> FlashInferGraphPlan:
        """See `GraphBackend`. Nothing is reserved: FlashInfer has places of its own."""
        assert len(rotation.cos) == max_num_tokens
        levels = 0 if self._fold_below == inf else _GRAPH_LEVELS
        return FlashInferGraphPlan(
            self.flashinfer,
            self._wrappers_on(rotation.cos.device),
            GraphMemory(levels, rotation.cos.device),
            self._computed,
            rotation,
            block_size=self._block_size,
            fold_below=self._fold_below,
        )

    def _wrappers_on(self, device: torch.device) -> Wrappers:
        if self._wrappers is None:
            self._wrappers = Wrappers(self.flashinfer, device)
        return self._wrappers

    def _plan(self, calls: StepCalls, wrappers: Wrappers, put: Put) -> "PlannedStep":
        computed, decodes, chunks, levels = self._computed, None, None, []
        if calls.decodes is not None:
            wrapper = wrappers.decode(on_tensor_cores=computed.on_tensor_cores)
            pages = put(calls.decodes.kv_indices)
            decodes = plan_decodes(wrapper, calls.decodes, pages, computed)
        if calls.chunks is not None:
            wrapper, pages = wrappers.prefill(0, self._kernel), put(calls.chunks.kv_indices)
            chunks = plan_prefill(wrapper, calls.chunks, pages, computed)
        for place, level in enumerate(calls.levels, start=1):
            many = level.call.mean_queries >= _FA3_QUERIES
            wrapper = wrappers.prefill(place, self._kernel if many else "fa2")
            planned = plan_prefill(wrapper, level.call, put(level.call.kv_indices), computed)
            levels.append((planned, None if level.covered is None else put(level.covered)))
        rows = None if calls.decode_rows is None else put(calls.decode_rows)
        return PlannedStep(decodes, rows, chunks, levels)


def make_flashinfer(
    block_size: int, heads: Heads | None, kv_dtype: torch.dtype | None
) -> FlashInferBackend:
    """With the FlashInfer that is installed, for these heads.

    Raises:
        UsageError: there is none, or no GPU, or it cannot do what is asked for.
    """
    return FlashInferBackend(block_size, _checked(heads, kv_dtype), load_flashinfer())


def make_flat(
    block_size: int, heads: Heads | None, kv_dtype: torch.dtype | None
) -> FlashInferBackend:
    """The same without sharing, what its cascade is to be compared with."""
    heads, library = _checked(heads, kv_dtype), load_flashinfer()
    return FlashInferBackend(block_size, heads, library, name="flashinfer-flat", fold_below=inf)


def _checked(heads: Heads | None, kv_dtype: torch.dtype | None) -> Heads:
    assert heads is not None
    if kv_dtype not in (None, torch.bfloat16):
        raise UsageError(f"the flashinfer backends keep KV in bfloat16, not {kv_dtype}")
    return heads


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """`StepCalls`, planned, and what the device needs of them."""

    decodes: PlannedCall | None
    decode_rows: torch.Tensor | None
    chunks: PlannedCall | None
    levels: list[tuple[PlannedCall, torch.Tensor | None]]


class FlashInferPlan:
    """A step's calls."""

    def __init__(
        self,
        library: Any,  # noqa: ANN401
        step: PlannedStep,
        write: Write,
        rotation: Rotation,
        dtype: torch.dtype,
    ) -> None:
        self._library = library
        self._step = step
        self._dtype = dtype
        self._write = write
        self._rotation = rotation
        self._cos_sin: torch.Tensor | None = None  # the rotation is filled after the plan is made

    def run(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `LayerPlan.run`.

        Raises:
            UsageError: the model is of another dtype than was planned for.
        """
        if qkv.dtype != self._dtype:
            raise UsageError(f"FlashInfer computes in {self._dtype}; the model is {qkv.dtype}")
        if self._cos_sin is None:
            self._cos_sin = torch.cat([self._rotation.cos, self._rotation.sin], dim=1)
        step = self._step
        query = self._write.run(self._cos_sin, qkv, keys, values)
        out = query.new_empty(query.shape)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32) if step.levels else None
        _attend_to_own(step, query, keys, values, out, lse)
        if lse is not None:
            merge_levels(self._library, step.levels, query, keys, values, out, lse)
        return out.flatten(1)


def _attend_to_own(
    step: PlannedStep,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    if step.chunks is not None:
        step.chunks.run(query, keys, values, out, lse)
    if step.decodes is None:
        return
    if step.decode_rows is None:
        step.decodes.run(query, keys, values, out, lse)
        return
    rows = step.decode_rows
    some = query.index_select(0, rows)
    some_out = torch.empty_like(some)
    some_lse = None if lse is None else lse.new_empty(some.shape[:2])
    step.decodes.run(some, keys, values, some_out, some_lse)
    out.index_copy_(0, rows, some_out)
    if lse is not None and some_lse is not None:
        lse.index_copy_(0, rows, some_lse)
