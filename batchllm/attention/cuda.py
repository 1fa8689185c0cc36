"""Attention by our own CUDA kernel: all groups, shared and private segments, in one launch."""

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from batchllm.attention.backend import Heads, Reserve
from batchllm.attention.cuda_library import (
    KV_TYPES,
    Array,
    AttentionLayer,
    AttentionStep,
    CudaLibrary,
    load_cuda_library,
)
from batchllm.attention.cuda_plan import UnitCosts, WorkPlan, plan_units
from batchllm.errors import UsageError
from batchllm.models.rope import Rotation
from batchllm.runner.kv_cache import kv_row_values
from batchllm.runner.model_input import ModelInput
from batchllm.runner.staging import Put

if TYPE_CHECKING:
    from batchllm.attention.cuda_graph import CudaGraphPlan

HEAD_DIMS = (64, 96, 128)
_MOST_GROUP = 64  # query heads of a kv head: the rows of one unit


class CudaBackend:
    """Attention over the prefix tree by the kernel in cuda/, planned in numpy once a step.

    Queries, keys and values come in bfloat16; the cache is of `kv_dtype`: bfloat16, float8_e4m3fn
    or int8, whose rows have scales (`kv_row_values`).

    Raises:
        UsageError: the kernel cannot do these sizes.
    """

    granularity = 1

    def __init__(
        self,
        block_size: int,
        heads: Heads,
        kernels: CudaLibrary,
        *,
        kv_dtype: torch.dtype = torch.bfloat16,
        costs: UnitCosts | None = None,
    ) -> None:
        _check_sizes(block_size, heads, kv_dtype)
        self.name = "cuda (emulated)" if kernels.is_emulated else "cuda"
        self.kernels = kernels
        self.heads = heads
        self.kv_dtype = kv_dtype
        self.block_size = block_size
        self.num_blocks = kernels.resident_blocks(heads.head_dim, kv_dtype)
        self.costs = costs or UnitCosts()

    def on_share(self, share: float) -> "CudaBackend":
        """With so much fewer of the kernel's blocks; see `SharingBackend`."""
        backend = copy.copy(self)
        backend.num_blocks = max(int(self.num_blocks * share), 1)
        return backend

    def plan(
        self,
        step: ModelInput,
        rotation: Rotation,
        put: Put = torch.from_numpy,
    ) -> "CudaPlan":
        """See `AttentionBackend`."""
        work = self.plan_work(step)
        there = {name: put(array) for name, array in arrays_of(work, step).items()}
        device = rotation.cos.device
        rows = work.num_partial_rows * self.heads.num_kv_heads
        there["next_unit"] = torch.empty(1, dtype=torch.int32, device=device)
        there["partial_out"] = torch.empty(rows * self.heads.head_dim, device=device)
        there["partial_lse"] = torch.empty(rows, device=device)
        return CudaPlan(self, there | {"cos": rotation.cos, "sin": rotation.sin})

    def graph_plan(
        self, max_num_tokens: int, rotation: Rotation, reserve: Reserve
    ) -> "CudaGraphPlan":
        """See `GraphBackend`."""
        from batchllm.attention.cuda_graph import CudaGraphPlan

        return CudaGraphPlan(self, max_num_tokens, rotation, reserve)

    def plan_work(self, step: ModelInput) -> WorkPlan:
        """The step's units."""
        return plan_units(
            step.items,
            len(step.token_ids),
            group=self.heads.group,
            num_kv_heads=self.heads.num_kv_heads,
            num_blocks=self.num_blocks,
            costs=self.costs,
        )


def make_cuda(block_size: int, heads: Heads | None, kv_dtype: torch.dtype | None) -> CudaBackend:
    """With the kernels that were compiled with batchllm, for these heads, measured on the GPU.

    Raises:
        UsageError: there are none, or no GPU, or they cannot do these sizes.
    """
    from batchllm.attention.timing import gpu_seconds, with_measured_costs

    assert heads is not None
    kernels = load_cuda_library()
    backend = CudaBackend(block_size, heads, kernels, kv_dtype=kv_dtype or torch.bfloat16)
    backend.costs = with_measured_costs(backend, torch.device("cuda"), gpu_seconds)
    return backend


def arrays_of(work: WorkPlan, step: ModelInput) -> dict[str, NDArray[Any]]:
    """What the kernel reads of a step, by the names of `AttentionStep`."""
    counts = [len(step.token_ids), len(work.units), len(work.merge_query)]
    return {
        "counts": np.array(counts, dtype=np.int32),
        "slots": step.slots,
        "units": work.units,
        "read_key": work.read_key,
        "read_block": work.read_block,
        "block_ids": work.block_ids,
        "merge_query": work.merge_query,
        "merge_offsets": work.merge_offsets,
        "merge_origins": work.merge_origins,
    }


class CudaPlan:
    """A step for the kernel: `tensors`, on the device, by the names of `AttentionStep`."""

    def __init__(self, backend: CudaBackend, tensors: dict[str, torch.Tensor]) -> None:
        heads = backend.heads
        self._backend = backend
        self._tensors = tensors  # `_step` points to them
        self._step = AttentionStep(
            **{name: Array.of(tensor) for name, tensor in tensors.items()},
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            block_shift=backend.block_size.bit_length() - 1,
            kv_type=KV_TYPES[backend.kv_dtype],
        )

    def run(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `LayerPlan.run`."""
        backend, heads = self._backend, self._backend.heads
        width = heads.num_heads + 2 * heads.num_kv_heads
        assert qkv.shape[1:] == (width, heads.head_dim), qkv.shape
        assert qkv.dtype == torch.bfloat16, qkv.dtype
        row = (backend.block_size, heads.num_kv_heads, kv_row_values(heads.head_dim, keys.dtype))
        assert keys.shape[1:] == values.shape[1:] == row, keys.shape
        assert keys.dtype == values.dtype == backend.kv_dtype, keys.dtype
        out = qkv.new_empty(len(qkv), heads.num_heads * heads.head_dim)
        layer = AttentionLayer(
            Array.of(qkv), Array.of_bytes(keys), Array.of_bytes(values), Array.of(out)
        )
        stream = torch.cuda.current_stream().cuda_stream if qkv.is_cuda else 0
        backend.kernels.attention(self._step, layer, heads.head_dim, backend.num_blocks, stream)
        return out


def _check_sizes(block_size: int, heads: Heads, kv_dtype: torch.dtype) -> None:
    if block_size & (block_size - 1):
        raise UsageError(
            f"the cuda attention kernel needs a block_size that is a power of two; it is "
            f"{block_size}"
        )
    if heads.head_dim not in HEAD_DIMS:
        raise UsageError(
            f"the cuda attention kernel is compiled for a head_dim of "
            f"{', '.join(map(str, HEAD_DIMS))}; it is {heads.head_dim}"
        )
    if heads.group > _MOST_GROUP:
        raise UsageError(
            f"the cuda attention kernel takes up to {_MOST_GROUP} query heads a kv head; the model "
            f"has {heads.group}"
        )
    if kv_dtype == torch.int8 and block_size % 4:
        raise UsageError(f"int8 KV needs a block_size of 4 or more; it is {block_size}")
