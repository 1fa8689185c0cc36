"""FlashInfer's wrapper objects, which plan a call once a step and run it once a layer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from batchllm.attention.backend import Heads
from batchllm.attention.flashinfer_arrays import PagedCall

WORKSPACE_BYTES = 384 << 20  # partial results of split contexts: 17 MiB x heads of a group (H100)
_TENSOR_CORE_GROUP = 4  # so many heads to a key, and decodes are faster on tensor cores


@dataclass(frozen=True, slots=True)
class Computed:
    """What a plan depends on beside its call: the heads, and the dtype of all that is computed."""

    heads: Heads
    dtype: torch.dtype

    @property
    def on_tensor_cores(self) -> bool:
        """Whether decodes are."""
        return self.heads.group >= _TENSOR_CORE_GROUP


@dataclass(frozen=True, slots=True)
class PlannedCall:
    """A call as FlashInfer has planned it."""

    wrapper: Any
    page_size: int

    def run(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        """Attend, into `out` [num_queries, num_heads, head_dim], and `lse` float32, base 2.

        `query` is like `out`; keys and values as in `LayerPlan.run`, tokens in a block in order.
        """
        pages = tuple(cache.view(-1, self.page_size, *cache.shape[2:]) for cache in (keys, values))
        self.wrapper.run(query, pages, out=out, lse=lse, return_lse=lse is not None)


def plan_decodes(
    wrapper: Any,  # noqa: ANN401
    call: PagedCall,
    kv_indices: torch.Tensor,
    computed: Computed,
) -> PlannedCall:
    """Have a decode wrapper plan a call with one query an entry.

    Its pages, which are many, are on the device already, or on their way there.
    """
    device, heads = kv_indices.device, computed.heads
    wrapper.plan(
        pinned(call.kv_indptr, device),
        kv_indices,
        pinned(call.last_page_len, device),
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        call.page_size,
        q_data_type=computed.dtype,
        kv_data_type=computed.dtype,
    )
    return PlannedCall(wrapper, call.page_size)


def plan_prefill(
    wrapper: Any,  # noqa: ANN401
    call: PagedCall,
    kv_indices: torch.Tensor,
    computed: Computed,
) -> PlannedCall:
    """Have a prefill wrapper plan a call; pages as in `plan_decodes`."""
    device, heads = kv_indices.device, computed.heads
    wrapper.plan(
        pinned(call.qo_indptr, device),
        pinned(call.kv_indptr, device),
        kv_indices,
        pinned(call.last_page_len, device),
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        call.page_size,
        causal=call.causal,
        q_data_type=computed.dtype,
        kv_data_type=computed.dtype,
    )
    return PlannedCall(wrapper, call.page_size)


def merge_levels(
    library: Any,  # noqa: ANN401
    levels: list[tuple[PlannedCall, torch.Tensor | None]],
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Attend to what is shared, level by level, and merge it into `out` and `lse`."""
    other, other_lse = torch.empty_like(out), torch.empty_like(lse)
    for call, covered in levels:
        call.run(query, keys, values, other, other_lse)
        library.merge_state_in_place(out, lse, other, other_lse, covered)


class Wrappers:
    """The wrappers of one backend, one for each call of a step, made when there first is such one.

    `workspace` is for whoever runs, one at a time.
    """

    def __init__(self, library: Any, device: torch.device) -> None:  # noqa: ANN401
        self._library = library
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.copies = PlanCopies()
        self._made: dict[tuple[object, ...], Any] = {}

    def decode(self, *, on_tensor_cores: bool) -> Any:  # noqa: ANN401
        """For calls with one query an entry."""
        make = self._library.BatchDecodeWithPagedKVCacheWrapper
        return self._wrapper(make, "decodes", use_tensor_cores=on_tensor_cores)

    def prefill(self, place: int, kernel: str) -> Any:  # noqa: ANN401
        """For any call, the step's at `place`, by FlashInfer's kernel `fa2`, `fa3` or `auto`."""
        make = self._library.BatchPrefillWithPagedKVCacheWrapper
        return self._wrapper(make, place, backend=kernel)

    def _wrapper(self, make: Any, place: object, **kind: object) -> Any:  # noqa: ANN401
        key = (place, *kind.values())
        if key not in self._made:
            with torch.inference_mode(mode=False):  # so that it can be planned in any mode
                self._made[key] = make(self.workspace, "NHD", **kind)
        return self._made[key]


class PlanCopies:
    """When the device has copied what the last plans left for it.

    `plan` fills pinned memory of its wrapper's, and leaves it to the device to copy that in its
    turn, which is behind the step that runs. Planned again before that, a step is computed by
    another's plan (mini-sglang pull request 103 and vllm issue 40756 tell how it shows). Who is one
    step ahead waits for nothing: the step before is running, so its plans are copied.
    """

    def __init__(self) -> None:
        self._made: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until wrappers may be planned again."""
        if self._made is not None:
            self._made.synchronize()

    def mark(self, device: torch.device) -> None:
        """All calls of a step are planned."""
        if device.type == "cuda":
            self._made = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._made.record()


def pinned(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array on the host, from where the device can copy it in its turn.

    `plan` reads what tells it how much work there is on the host; given it on the device, it would
    wait for all that the device has still to do.
    """
    host = torch.from_numpy(array)
    return host.pin_memory() if device.type == "cuda" else host


def on_device(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """An array on the device, without waiting for it."""
    return pinned(array, device).to(device, non_blocking=True)
