"""Decode steps of the `cuda` kernel from places that never move, so that they can be recorded.

What differs between steps, the number of units too, the kernel reads from the device: the same
launches do for all of them.
"""

import numpy as np
import torch

from batchllm.attention.backend import Reserve
from batchllm.attention.cuda import CudaBackend, CudaPlan, arrays_of
from batchllm.attention.cuda_plan import LARGE_ROWS
from batchllm.models.rope import Rotation
from batchllm.runner.model_input import ModelInput

# Room for what a decode has to read and to merge at most, on average over a step's.
_READS = 8
_PARTS = 3
_BLOCKS = 128


class CudaGraphPlan:
    """The plan of all steps of up to `max_num_tokens` decodes; see `GraphPlan`."""

    def __init__(
        self, backend: CudaBackend, max_num_tokens: int, rotation: Rotation, reserve: Reserve
    ) -> None:
        heads = backend.heads
        pieces = backend.num_blocks // heads.num_kv_heads + 1  # what cutting adds to units at most
        num_units = 2 * max_num_tokens + pieces
        self._backend = backend
        self._num_rows = _PARTS * max_num_tokens * heads.group + LARGE_ROWS * pieces
        sizes = {
            "counts": 3,
            "slots": max_num_tokens,
            "units": num_units * 10,
            "read_key": _READS * max_num_tokens,
            "read_block": _READS * max_num_tokens,
            "merge_query": max_num_tokens,
            "merge_offsets": max_num_tokens + 1,
            "merge_origins": _PARTS * max_num_tokens + LARGE_ROWS * pieces,
            "block_ids": _BLOCKS * max_num_tokens,  # the fullest one last, see `FixedStager`
        }
        self._places = {
            name: reserve(size, np.int64 if name == "slots" else np.int32)
            for name, size in sizes.items()
        }
        tensors = {name: place.tensor for name, place in self._places.items()}
        device, rows = rotation.cos.device, self._num_rows * heads.num_kv_heads
        tensors["next_unit"] = torch.empty(1, dtype=torch.int32, device=device)
        tensors["partial_out"] = torch.empty(rows * heads.head_dim, device=device)
        tensors["partial_lse"] = torch.empty(rows, device=device)
        plan = CudaPlan(backend, tensors | {"cos": rotation.cos, "sin": rotation.sin})
        self.run = plan.run

    def update(self, step: ModelInput) -> bool:
        """Fill the places for a step; False where there is no room."""
        work = self._backend.plan_work(step)
        arrays = arrays_of(work, step)
        if work.num_partial_rows > self._num_rows:
            return False
        if any(array.size > len(self._places[name].tensor) for name, array in arrays.items()):
            return False
        for name, array in arrays.items():
            self._places[name].fill(array)
        return True
