"""Which type to compute in. No torch: a job's identity needs the name before anything is loaded."""

from pathlib import Path

from batchllm.config import EngineConfig
from batchllm.native.kernels import usable_targets
from batchllm.runner.choose_device import choose_device

CPUINFO = Path("/proc/cpuinfo")


def choose_dtype(config: EngineConfig, stored: str) -> str:
    """`bfloat16` or `float32`; `auto` is bfloat16 where that is stored and no slower.

    The compiled kernels are fast in it on more processors than torch is. On a GPU it is always
    bfloat16: attention kernels there know nothing wider.
    """
    if config.dtype != "auto":
        return config.dtype
    if choose_device(config.device) == "cuda":
        return "bfloat16"
    if stored == "float32":
        return "float32"
    compiled = config.attention_backend in ("auto", "native") and has_kernels()
    return "bfloat16" if compiled or has_fast_bfloat16() else "float32"


def has_fast_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the processor multiplies bfloat16 itself; elsewhere torch is faster in float32."""
    try:
        flags = cpuinfo.read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def has_kernels(cpuinfo: Path = CPUINFO) -> bool:
    """Whether kernels were compiled for this very kind of processor.

    In bfloat16 they are no slower than in float32, of which it is half the memory.
    """
    return any(target != "portable" for target in usable_targets(cpuinfo))
