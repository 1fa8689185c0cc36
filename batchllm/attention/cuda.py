"""Attention by our own CUDA kernel: all groups, shared and private segments, in one launch."""

import numpy as np
import torch

from batchllm.attention.cuda_library import (
    KV_TYPES,
    Array,
    AttentionLayer,
    AttentionStep,
    CudaLibrary,
)
from batchllm.attention.cuda_plan import UnitCosts, WorkPlan, plan_units
from batchllm.errors import UsageError
from batchllm.models.rope import Rotation
from batchllm.runner.model_input import ModelInput

HEAD_DIMS = (64, 96, 128)
_SCALE_BYTES = 4  # of a token's head, where it has a scale


def kv_row_values(head_dim: int, kv_dtype: torch.dtype) -> int:
    """The last size of a cache whose rows have `head_dim` values: what scales take is added."""
    return head_dim + _SCALE_BYTES if kv_dtype == torch.int8 else head_dim


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
        head_dim: int,
        library: CudaLibrary,
        *,
        kv_dtype: torch.dtype = torch.bfloat16,
        costs: UnitCosts | None = None,
    ) -> None:
        if block_size & (block_size - 1):
            raise UsageError(
                f"the cuda attention kernel needs a block_size that is a power of two; it is "
                f"{block_size}"
            )
        if head_dim not in HEAD_DIMS:
            raise UsageError(
                f"the cuda attention kernel is compiled for a head_dim of "
                f"{', '.join(map(str, HEAD_DIMS))}; it is {head_dim}"
            )
        if kv_dtype == torch.int8 and block_size % 4:
            raise UsageError(f"int8 KV needs a block_size of 4 or more; it is {block_size}")
        self.name = "cuda (emulated)" if library.is_emulated else "cuda"
        self.library = library
        self.kv_dtype = kv_dtype
        self.num_blocks = library.resident_blocks(head_dim, kv_dtype)
        self.costs = costs or UnitCosts()
        self.block_size = block_size

    def plan(self, step: ModelInput, rotation: Rotation) -> "CudaPlan":
        """See `AttentionBackend`."""
        return CudaPlan(self, step, rotation)


class CudaPlan:
    """A step for the kernel. Units depend on the heads, so they are planned at the first layer."""

    def __init__(self, backend: CudaBackend, step: ModelInput, rotation: Rotation) -> None:
        self._backend = backend
        self._input = step
        self._rotation = rotation
        self._step: AttentionStep | None = None
        self._kept: list[torch.Tensor] = []  # what `_step` points to

    def run(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `LayerPlan.run`."""
        backend = self._backend
        assert qkv.dtype == torch.bfloat16, qkv.dtype
        assert keys.dtype == values.dtype == backend.kv_dtype, keys.dtype
        num_tokens, width, head_dim = qkv.shape
        num_kv_heads = keys.shape[2]
        num_heads = width - 2 * num_kv_heads
        if self._step is None:
            self._step = self._prepare(num_heads, num_kv_heads, qkv.device)
        out = qkv.new_empty(num_tokens, num_heads * head_dim)
        assert keys.shape[3] == kv_row_values(head_dim, keys.dtype)
        layer = AttentionLayer(
            Array.of(qkv), Array.of_bytes(keys), Array.of_bytes(values), Array.of(out)
        )
        stream = torch.cuda.current_stream().cuda_stream if qkv.is_cuda else 0
        backend.library.attention(self._step, layer, head_dim, backend.num_blocks, stream)
        return out

    def _prepare(self, num_heads: int, num_kv_heads: int, device: torch.device) -> AttentionStep:
        backend, step = self._backend, self._input
        work = plan_units(
            step.items,
            len(step.token_ids),
            group=num_heads // num_kv_heads,
            num_kv_heads=num_kv_heads,
            num_blocks=backend.num_blocks,
            costs=backend.costs,
        )
        return self._step_of(work, num_heads, num_kv_heads, device)

    def _step_of(
        self, work: WorkPlan, num_heads: int, num_kv_heads: int, device: torch.device
    ) -> AttentionStep:
        counts = [len(self._input.token_ids), len(work.units), len(work.merge_query)]
        head_dim = 2 * self._rotation.cos.shape[1]
        rows = work.num_partial_rows * num_kv_heads

        def there(array: np.ndarray) -> Array:
            return self._keep(torch.from_numpy(np.ascontiguousarray(array)).to(device))

        return AttentionStep(
            counts=there(np.array(counts, dtype=np.int32)),
            slots=there(self._input.slots),
            cos=self._keep(self._rotation.cos),
            sin=self._keep(self._rotation.sin),
            units=there(work.units),
            read_key=there(work.read_key),
            read_block=there(work.read_block),
            block_ids=there(work.block_ids),
            merge_query=there(work.merge_query),
            merge_offsets=there(work.merge_offsets),
            merge_origins=there(work.merge_origins),
            next_unit=self._keep(torch.zeros(1, dtype=torch.int32, device=device)),
            partial_out=self._keep(torch.empty(rows * head_dim, device=device)),
            partial_lse=self._keep(torch.empty(rows, device=device)),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            block_shift=self._backend.block_size.bit_length() - 1,
            kv_type=KV_TYPES[self._backend.kv_dtype],
        )

    def _keep(self, tensor: torch.Tensor) -> Array:
        self._kept.append(tensor)
        return Array.of(tensor)
