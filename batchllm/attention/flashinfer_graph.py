"""FlashInfer's calls for steps of decodes that are recorded once and replayed (CUDA graphs)."""

from typing import Any

import numpy as np
import torch

from batchllm.attention.flashinfer_arrays import PagedCall, StepCalls, plan_calls
from batchllm.attention.flashinfer_wrappers import (
    WORKSPACE_BYTES,
    Computed,
    PlannedCall,
    Wrappers,
    merge_levels,
    on_device,
    pinned,
    plan_decodes,
    plan_prefill,
)
from batchllm.attention.flashinfer_write import Write
from batchllm.models.rope import Rotation
from batchllm.runner.model_input import ModelInput

_ENTRIES = 64  # of a level: groups, and what lies between them
_OWN_PAGES = 1 << 20  # of one token
_LEVEL_PAGES = 1 << 16
_PLAN_BYTES = 1 << 20  # a plan of FlashInfer's, on the device


class GraphMemory:
    """What recordings of all sizes use, one at a time; none of it ever moves.

    `pages` hold the page tables, `plans` what FlashInfer plans: of decodes, then of each level.
    """

    def __init__(self, num_levels: int, device: torch.device) -> None:
        sizes = [_OWN_PAGES, *[_LEVEL_PAGES] * num_levels]
        self.pages = [torch.zeros(n, dtype=torch.int32, device=device) for n in sizes]
        self.plans = [torch.zeros(_PLAN_BYTES, dtype=torch.uint8, device=device) for _ in sizes]


class FlashInferGraphPlan:
    """A `GraphPlan`: for each number of decodes FlashInfer's wrappers, made at the first such step.

    FlashInfer promises that a call always does the same if it has as many entries every time. So
    there are always as many levels of as many entries, empty where a step has fewer; deeper trees
    have the rest folded, and own segments are in pages of one token whatever is.
    """

    def __init__(
        self,
        library: Any,  # noqa: ANN401
        wrappers: Wrappers,
        memory: GraphMemory,
        computed: Computed,
        rotation: Rotation,
        *,
        block_size: int,
        fold_below: float,
    ) -> None:
        self._library = library
        self._wrappers, self._memory, self._computed = wrappers, memory, computed
        self._rotation = rotation
        self._block_size, self._fold_below = block_size, fold_below
        self._num_processors = _num_processors(rotation.cos.device)
        self._decodes: dict[int, _Decodes] = {}

    def update(self, step: ModelInput) -> bool:
        """See `GraphPlan.update`."""
        num_tokens = len(step.token_ids)
        calls = plan_calls(
            step.items,
            num_tokens,
            self._block_size,
            self._fold_below,
            most_levels=len(self._memory.pages) - 1,
            most_page_size=1,
        )
        if not self._fits(calls, num_tokens):
            return False
        if num_tokens not in self._decodes:
            with torch.inference_mode(mode=False):  # so that it can be planned in any mode
                self._decodes[num_tokens] = _Decodes(
                    self._library,
                    self._wrappers.workspace,
                    self._memory,
                    self._computed,
                    self._rotation.first(num_tokens),
                )
        self._wrappers.copies.wait()
        self._decodes[num_tokens].update(calls, step.slots, self._block_size)
        self._wrappers.copies.mark(self._rotation.cos.device)
        return True

    def run(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `LayerPlan.run`."""
        return self._decodes[len(qkv)].run(qkv, keys, values)

    def _fits(self, calls: StepCalls, num_tokens: int) -> bool:
        if calls.chunks is not None or calls.decodes is None:
            return False
        sizes = [len(calls.decodes.kv_indices), *[len(v.call.kv_indices) for v in calls.levels]]
        return (
            all(n <= len(m) for n, m in zip(sizes, self._memory.pages, strict=False))
            and all(len(level.call) <= _num_entries(num_tokens) for level in calls.levels)
            and self._workspace_bytes(num_tokens) <= WORKSPACE_BYTES
        )

    def _workspace_bytes(self, num_tokens: int) -> int:
        """What FlashInfer takes for partial results in a recording, where it always splits.

        A tile's are float32 for all heads, for as many tiles as there could be.
        """
        heads = self._computed.heads
        resident = 2 * self._num_processors // heads.num_kv_heads
        needed = []
        for entries, is_decode in ((num_tokens, True), (_num_entries(num_tokens), False)):
            longest = (num_tokens - entries + 1) * heads.group
            tile = 16 if longest <= 16 else 64 if longest <= 64 or heads.head_dim >= 256 else 128
            if is_decode and not self._computed.on_tensor_cores:
                tile = heads.group  # one query
            tiles = max(resident, -(-num_tokens * heads.group // tile) + entries)
            needed.append(4 * heads.num_heads * tiles * tile * (heads.head_dim + 1))
        return max(needed)


class _Decodes:
    """The calls of steps with as many decodes as `rotation` is for.

    Rotations, slots, page tables and plans lie where they always lie.
    """

    def __init__(
        self,
        library: Any,  # noqa: ANN401
        workspace: torch.Tensor,
        memory: GraphMemory,
        computed: Computed,
        rotation: Rotation,
    ) -> None:
        self._library, self._computed, self._rotation = library, computed, rotation
        self._workspace, self._memory = workspace, memory
        self._device, self._num_tokens = rotation.cos.device, len(rotation.cos)
        self._num_levels = len(memory.pages) - 1
        self._slots = self._ints(self._num_tokens)
        self._covered = self._ints(self._num_levels, self._num_tokens).bool()
        self._write = Write(library, self._slots)
        self._decode = self._decode_wrapper()
        self._prefill = [self._prefill_wrapper(1 + level) for level in range(self._num_levels)]
        self._planned: PlannedCall | None = None
        self._levels: list[tuple[PlannedCall, torch.Tensor | None]] = []

    def update(self, calls: StepCalls, slots: np.ndarray[Any, Any], block_size: int) -> None:
        """Plan a step that fits."""
        assert calls.decodes is not None
        covered = np.zeros((self._num_levels, self._num_tokens), dtype=np.bool_)
        for place, level in enumerate(calls.levels):
            covered[place] = True if level.covered is None else level.covered
        self._fill(self._slots, slots.astype(np.int32))
        self._fill(self._covered, covered)
        entries = _num_entries(self._num_tokens)
        levels = [_fill_up(level.call, entries) for level in calls.levels]
        nothing = _fill_up(_nothing(self._num_tokens, block_size), entries)
        levels += [nothing] * (self._num_levels - len(levels))
        pages = self._pages_of(calls.decodes)
        self._planned = plan_decodes(self._decode, calls.decodes, pages, self._computed)
        self._levels = [
            (plan_prefill(wrapper, call, self._pages_of(call), self._computed), mask)
            for wrapper, call, mask in zip(self._prefill, levels, self._covered, strict=True)
        ]

    def run(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `LayerPlan.run`. Which layer it is cannot be known, so each copies the rotation."""
        assert self._planned is not None
        cos_sin = torch.cat([self._rotation.cos, self._rotation.sin], dim=1)
        query = self._write.run(cos_sin, qkv, keys, values)
        out = query.new_empty(query.shape)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        self._planned.run(query, keys, values, out, lse)
        merge_levels(self._library, self._levels, query, keys, values, out, lse)
        return out.flatten(1)

    def _decode_wrapper(self) -> Any:  # noqa: ANN401
        wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self._computed.on_tensor_cores,
            paged_kv_indptr_buffer=self._ints(self._num_tokens + 1),
            paged_kv_indices_buffer=self._memory.pages[0],
            paged_kv_last_page_len_buffer=self._ints(self._num_tokens),
        )
        wrapper.reset_workspace_buffer(self._workspace, self._memory.plans[0])
        return wrapper

    def _prefill_wrapper(self, place: int) -> Any:  # noqa: ANN401
        entries = _num_entries(self._num_tokens)
        wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            qo_indptr_buf=self._ints(entries + 1),
            paged_kv_indptr_buf=self._ints(entries + 1),
            paged_kv_indices_buf=self._memory.pages[place],
            paged_kv_last_page_len_buf=self._ints(entries),
            backend="fa2",
        )
        wrapper.reset_workspace_buffer(self._workspace, self._memory.plans[place])
        return wrapper

    def _ints(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self._device)

    def _fill(self, place: torch.Tensor, array: np.ndarray[Any, Any]) -> None:
        place.copy_(pinned(array, self._device), non_blocking=True)

    def _pages_of(self, call: PagedCall) -> torch.Tensor:
        # From the host FlashInfer would copy these into its buffer while the host waits.
        return on_device(call.kv_indices, self._device)


def _num_entries(num_tokens: int) -> int:
    return min(num_tokens, _ENTRIES)


def _nothing(num_tokens: int, page_size: int) -> PagedCall:
    """A call in which no query reads anything."""
    zeros = np.zeros(2, dtype=np.int32)
    ends = np.array([0, num_tokens], dtype=np.int32)
    return PagedCall(ends, zeros, zeros[:0], zeros[:1], page_size, causal=False)


def _fill_up(call: PagedCall, num_entries: int) -> PagedCall:
    """The same call with more entries, of no query and no page."""
    more = num_entries - len(call)
    return PagedCall(
        np.append(call.qo_indptr, np.repeat(call.qo_indptr[-1], more)),
        np.append(call.kv_indptr, np.repeat(call.kv_indptr[-1], more)),
        call.kv_indices,
        np.append(call.last_page_len, np.zeros(more, dtype=np.int32)),
        call.page_size,
        call.causal,
    )


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
