"""Which type to compute in. No torch: a job's identity needs the name before anything is loaded."""

from pathlib import Path

from batchllm.native.kernels import usable_targets


def choose_dtype(wanted: str, stored: str) -> str:
    """`bfloat16` or `float32`; `auto` is bfloat16 where weights and processor are made for it."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if stored != "float32" and has_fast_bfloat16() else "float32"


def has_fast_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether bfloat16 is no slower here than float32, of which it is half the memory.

    The processor multiplies it itself, or it is one that the kernels were compiled for; torch's own
    products take several times as long otherwise.
    """
    try:
        flags = cpuinfo.read_text()
    except OSError:
        return False
    if any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16")):
        return True
    return any(target != "portable" for target in usable_targets(cpuinfo))
