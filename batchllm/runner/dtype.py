"""Which type to compute in. No torch: a job's identity needs the name before anything is loaded."""

from pathlib import Path


def choose_dtype(wanted: str, stored: str) -> str:
    """`bfloat16` or `float32`; `auto` is bfloat16 where weights and processor are made for it."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if stored != "float32" and has_fast_bfloat16() else "float32"


def has_fast_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bfloat16 itself; elsewhere torch is faster in float32."""
    try:
        flags = cpuinfo.read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))
