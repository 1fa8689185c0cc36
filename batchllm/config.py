"""How the engine is set up: frozen, validated once."""

import difflib
import re
from dataclasses import dataclass, fields
from typing import Any

from batchllm.errors import UsageError

DTYPES = ("auto", "bfloat16", "float32")
QUANTIZATIONS = ("int8", "fp8")
KV_CACHE_DTYPES = ("auto", "fp8", "int8")
DEVICES = ("auto", "cpu", "cuda")
_SIZE_DIGITS = 20
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """Most prompt tokens and most sequences in one step."""

    max_num_batched_tokens: int
    max_num_seqs: int


# Every step of a GPU reads all weights, however few tokens it has, so steps are large there; and
# what it holds in KV should be what limits the sequences that run.
_STEP_LIMITS = {
    "cpu": StepLimits(max_num_batched_tokens=2048, max_num_seqs=1024),
    "cuda": StepLimits(max_num_batched_tokens=8192, max_num_seqs=4096),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything about *how* answers are computed. None of it changes them by more than rounding.

    `dtype`, `quantization` and `kv_cache_dtype` say what is rounded to, so they belong to a job's
    identity; eight bits round far more coarsely than any dtype. Others, like `sharing` and
    `threads`, at most change the order of a sum; with `deterministic`, which belongs to the
    identity too, not even that. `device` is what the model runs on; `auto` is a GPU where torch can
    use one. `overlap`: where that is faster, a GPU attends to one half of a step beside the
    products of the other. `kv_memory` is in bytes; None takes a share of the device's free memory.
    `threads` is how many compute; None takes one a core that this process may use.
    `tensor_parallel_size` processes share the work on every step, and `data_parallel_size` times as
    many the rows; they divide threads and KV memory, and so do processes that do not know of each
    other and are told to take one of `machine_share` equal shares. `max_num_batched_tokens` bounds
    one step's prefill work; `max_num_seqs` bounds index arrays, not memory: admission is by
    projected KV use. None is what suits the device, see `step_limits`.

    Raises:
        UsageError: a value is out of range.
    """

    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    deterministic: bool = False
    policy: str = "auto"
    sharing: bool = True
    device: str = "auto"
    attention_backend: str = "auto"
    overlap: bool = True
    threads: int | None = None
    kv_memory: int | None = None
    max_model_len: int | None = None
    block_size: int = 16
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    machine_share: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype is {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise UsageError(
                f"quantization is {self.quantization!r}; there are: {', '.join(QUANTIZATIONS)}"
            )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise UsageError(
                f"kv_cache_dtype is {self.kv_cache_dtype!r}; choose one of "
                f"{', '.join(KV_CACHE_DTYPES)}"
            )
        if self.device not in DEVICES:
            raise UsageError(f"device is {self.device!r}; choose one of {', '.join(DEVICES)}")
        sizes = ("tensor_parallel_size", "data_parallel_size", "machine_share")
        for name in ("block_size", "max_num_batched_tokens", "max_num_seqs", *sizes):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise UsageError(
                f"threads is {self.threads}; it must be at least 1, or left out to be chosen"
            )
        for name in ("kv_memory", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be positive")

        if self.deterministic and self.tensor_parallel_size > 1:
            raise UsageError(
                f"tensor_parallel_size is {self.tensor_parallel_size}, but deterministic needs 1: "
                "in which order processes add up a sum depends on what else is in the step"
            )

    @property
    def kv_memory_each(self) -> int | None:
        """What a process that shares a model has of it."""
        return None if self.kv_memory is None else self.kv_memory // self.num_processes

    @property
    def num_processes(self) -> int:
        """How many share this machine's threads and memory."""
        return self.machine_share * self.data_parallel_size * self.tensor_parallel_size

    @classmethod
    def from_options(cls, **options: Any) -> "EngineConfig":
        """Build from keyword options; an unknown one is an error that names the nearest known."""
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise UsageError(f"unknown engine option {name!r}{hint}")
        return cls(**options)

    def step_limits(self, device: str) -> StepLimits:
        """What bounds a step on `cpu` or `cuda`: as asked, or as suits the device."""
        suits = _STEP_LIMITS[device]
        return StepLimits(
            max_num_batched_tokens=self.max_num_batched_tokens or suits.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs or suits.max_num_seqs,
        )


def parse_size(text: str) -> int:
    """Bytes from `512M`, `4GiB`, `2g`, `1000000` (binary units).

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match is None or len(match[1]) > _SIZE_DIGITS:
        raise UsageError(f"{text!r} is not a size; write it like 512M or 4GiB")
    return int(float(match[1]) * _UNITS[match[2]])
