"""Finding and loading the compiled kernels.

setup.py compiles the same sources once for each kind of processor; the best that this one runs is
loaded. The library needs no headers of torch or Python, and no OpenMP of its own: loaded after
torch, it takes torch's, so that there is one pool of threads in the process.
"""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

_HERE = Path(__file__).parent
_CPUINFO = Path("/proc/cpuinfo")
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
_AVX512_BF16 = _AVX512 | {"avx512_vnni", "avx512_bf16"}
# Best first, with the processor's flags that each needs.
_NEEDS: dict[str, frozenset[str]] = {
    "amx": _AVX512_BF16 | {"amx_tile", "amx_bf16", "amx_int8"},
    "avx512_bf16": _AVX512_BF16,
    "avx512_vnni": _AVX512 | {"avx512_vnni"},
    "avx512": _AVX512,
    "avx2": frozenset({"avx2", "fma"}),
    "portable": frozenset(),
}
# Intel's processors multiply pairs of bfloat16 at half the rate of floats, so widening is faster.
_SLOW_BF16 = "GenuineIntel"

NO_STRIPS = 0  # rows lie one behind the other
ALL_STRIPS = 3  # what goes in and what comes out lies in strips
_STRIP = 32  # rows that matrix tiles take at once; see native/src/strips.h


class NativeKernels:
    """The kernels compiled for one kind of processor. Pointers are to contiguous memory."""

    def __init__(self, target: str, path: Path) -> None:
        self.target = target
        library = ctypes.CDLL(str(path))
        if not library.batchllm_may_run():
            raise OSError(f"{path.name}: Linux does not let this process use matrix tiles")
        self.attention = library.batchllm_attention
        self.attention.argtypes = [c_void_p, c_void_p]
        self.add_rms_norm = library.batchllm_add_rms_norm
        self.add_rms_norm.argtypes = [c_int32, c_int64, c_int64, c_float, *[c_void_p] * 4, c_int32]
        self.silu_and_multiply = library.batchllm_silu_and_multiply
        self.silu_and_multiply.argtypes = [c_int32, c_int64, c_int64, c_void_p, c_void_p]
        self.argmax = library.batchllm_argmax
        self.argmax.argtypes = [c_int32, c_int64, c_int64, c_void_p, c_void_p]
        self.linear = library.batchllm_linear
        self.linear.argtypes = [c_int32, c_int64, *[c_void_p] * 4, c_int32]
        self.linear_int8 = library.batchllm_linear_int8
        self.linear_int8.argtypes = [c_int32, c_int64, *[c_void_p] * 5, c_int32]
        self.pack = library.batchllm_pack
        self.pack.argtypes = [c_int32, c_void_p, c_void_p]
        self.linear_argmax = library.batchllm_linear_argmax
        self.linear_argmax.argtypes = [c_int32, c_int32, c_int64, *[c_void_p] * 5]
        self.linear_argmax.restype = c_int32
        self.takes_strips = library.batchllm_takes_strips
        self.takes_strips.argtypes = [c_int32, c_int32, c_void_p]
        self.takes_strips.restype = c_int32
        self.block = library.batchllm_block
        self.block.argtypes = [c_void_p, c_void_p, c_int64, c_void_p]
        self.layers = library.batchllm_layers
        self.layers.argtypes = [*[c_void_p] * 4, c_int64]
        for function in (
            self.block,
            self.layers,
            self.attention,
            self.add_rms_norm,
            self.silu_and_multiply,
            self.argmax,
            self.linear,
            self.linear_int8,
            self.pack,
        ):
            function.restype = None
        self.panel_width: int = library.batchllm_panel_width()
        self.gated_width: int = library.batchllm_gated_width()
        self.gated_row_bytes: int = library.batchllm_gated_row_bytes()
        self.widened_bytes: int = library.batchllm_widened_bytes()
        self.rounded_bytes: int = library.batchllm_rounded_bytes()


def usable_targets(cpuinfo: Path = _CPUINFO, home: Path = _HERE) -> list[str]:
    """The kinds of processor that the kernels are compiled for and this one is, best first."""
    flags = _flags(cpuinfo)
    usable = [name for name, need in _NEEDS.items() if need <= flags and library_path(name, home)]
    if _SLOW_BF16 in flags and {"avx512_bf16", "avx512_vnni"} <= set(usable):
        usable.remove("avx512_bf16")
        usable.insert(usable.index("avx512_vnni") + 1, "avx512_bf16")
    return usable


def only_torch_has_tiles(cpuinfo: Path = _CPUINFO, home: Path = _HERE) -> bool:
    """Whether the processor has matrix tiles (AMX) and the compiler here did not know them."""
    return "amx_tile" in _flags(cpuinfo) and library_path("amx", home) is None


@cache
def load_kernels(target: str | None = None) -> NativeKernels | None:
    """The kernels for `target`, by default the best that runs here; None where there are none.

    A library that is there but does not load (built by a compiler whose OpenMP is not torch's) is
    as good as none.
    """
    import torch  # noqa: F401  (its OpenMP must be there first)

    for name in usable_targets():
        path = library_path(name)
        if path is None or (target is not None and name != target):
            continue
        try:
            return NativeKernels(name, path)
        except OSError:
            continue
    return None


def library_path(name: str, home: Path = _HERE) -> Path | None:
    """Where a library of setup.py's is, if it was compiled: its compiler was there at installation.

    `cuda` are the GPU's kernels.
    """
    found = [home / f"_{name}{suffix}" for suffix in EXTENSION_SUFFIXES]
    return next((path for path in found if path.exists()), None)


def whole_strips(rows: int) -> int:
    """As many rows as whole strips have: where rows lie in strips, there is memory for so many."""
    return -(-rows // _STRIP) * _STRIP


def _flags(cpuinfo: Path) -> frozenset[str]:
    try:
        return frozenset(cpuinfo.read_text().split())
    except OSError:
        return frozenset()
