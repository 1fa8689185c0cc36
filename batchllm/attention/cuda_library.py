"""The compiled `cuda` kernels, and what they are called with."""

import ctypes
from ctypes import c_char_p, c_int, c_int32, c_int64, c_long, c_void_p
from functools import cache
from pathlib import Path

import torch

from batchllm.errors import UsageError
from batchllm.native.kernels import library_path

# `KvType` of cuda/include/batchllm/step.h, by the dtype that a cache has.
KV_TYPES = {torch.bfloat16: 0, torch.float8_e4m3fn: 1, torch.int8: 2}


class Array(ctypes.Structure):
    """`Global` of cuda/include/batchllm/device.h: where an array is, and how many values it has."""

    _fields_ = [("data", c_void_p), ("size", c_int64)]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Array":
        """A tensor's memory, which must outlive the array."""
        assert tensor.is_contiguous()
        return cls(tensor.data_ptr(), tensor.numel())

    @classmethod
    def of_bytes(cls, tensor: torch.Tensor) -> "Array":
        """The same, counted in bytes."""
        assert tensor.is_contiguous()
        return cls(tensor.data_ptr(), tensor.nbytes)


class AttentionStep(ctypes.Structure):
    """`AttentionStep` of cuda/include/batchllm/step.h."""

    _fields_ = [
        *[(name, Array) for name in ("counts", "slots", "cos", "sin")],
        *[(name, Array) for name in ("units", "read_key", "read_block", "block_ids")],
        *[(name, Array) for name in ("merge_query", "merge_offsets", "merge_origins")],
        *[(name, Array) for name in ("next_unit", "partial_out", "partial_lse")],
        *[(name, c_int32) for name in ("num_heads", "num_kv_heads", "block_shift", "kv_type")],
    ]


class AttentionLayer(ctypes.Structure):
    """`AttentionLayer` of cuda/include/batchllm/step.h."""

    _fields_ = [(name, Array) for name in ("qkv", "keys", "values", "out")]


class CudaLibrary:
    """The kernels in a shared library: compiled for GPUs, or for the emulation, which has none.

    Raises:
        OSError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._attention = library.batchllm_attention
        self._attention.argtypes = [c_void_p, c_void_p, c_int, c_int, c_void_p]
        self._attention.restype = c_char_p
        self._resident_blocks = library.batchllm_resident_blocks
        self._resident_blocks.argtypes = [c_int, c_int]
        self._resident_blocks.restype = c_int
        self.is_emulated = hasattr(library, "batchllm_bank_conflicts")
        if self.is_emulated:
            library.batchllm_bank_conflicts.restype = c_long
            self.bank_conflicts = library.batchllm_bank_conflicts

    def resident_blocks(self, head_dim: int, kv_dtype: torch.dtype) -> int:
        """How many blocks of the attention kernel the device holds at once; 0 if it runs none."""
        return int(self._resident_blocks(head_dim, KV_TYPES[kv_dtype]))

    def attention(
        self, step: AttentionStep, layer: AttentionLayer, head_dim: int, blocks: int, stream: int
    ) -> None:
        """Rotate, write to the cache and attend, on a CUDA stream.

        Raises:
            RuntimeError: the launch failed, or the emulation found a fault in the kernel.
        """
        error = self._attention(ctypes.byref(step), ctypes.byref(layer), head_dim, blocks, stream)
        if error is not None:
            raise RuntimeError(f"attention kernel: {error.decode()}")


@cache
def load_cuda_library() -> CudaLibrary:
    """The kernels as they were compiled with batchllm.

    Raises:
        UsageError: they were not, or do not load, or there is no GPU.
    """
    path = library_path("cuda")
    if path is None:
        raise UsageError(
            "the cuda attention kernels were not compiled when batchllm was installed; install "
            "nvcc (the CUDA toolkit), then batchllm again"
        )
    if not torch.cuda.is_available():
        raise UsageError("the cuda attention kernels need a GPU, and torch finds none")
    try:
        return CudaLibrary(path)
    except OSError as error:
        raise UsageError(f"the cuda attention kernels do not load: {error}") from error
