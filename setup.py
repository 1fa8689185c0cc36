"""Compiles the kernels: the CPU's once for each kind of processor, the GPU's where there is nvcc.

And the simulator, once for all. Everything else about the package is in pyproject.toml. No headers
but the compilers' own are used; OpenMP is not linked: at run time torch's is there
(batchllm/native/kernels.py). What cannot be compiled is left out, and the tool works without,
slower.
"""

import copy
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
BF16 = [*AVX512, "-mavx512vnni", "-mavx512bf16"]
TARGETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    TARGETS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": AVX512,
        "avx512_vnni": [*AVX512, "-mavx512vnni"],
        "avx512_bf16": BF16,
        "amx": [*BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
    }
KERNELS = ("attention", "block", "elementwise", "linear", "packing")
SOURCES = [f"batchllm/native/src/{name}.cpp" for name in KERNELS]
HEADERS = sorted(map(str, Path("batchllm/native/src").glob("*.h")))
DEPENDS = [*HEADERS, "setup.py"]  # the flags are here
SIMULATOR = Path("batchllm/native/src/simulator")
# The warnings are about GCC's own intrinsics.
QUIET = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
FLAGS = ["-std=c++17", "-O3", "-g0", "-fopenmp", "-fno-math-errno", *QUIET]
# Every sum is rounded as numpy rounds it.
SIMULATOR_FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off"]

CUDA = Path(__file__).resolve().parent / "cuda"
sys.path.insert(0, str(CUDA))
import cuda_build as cuda  # noqa: E402

CUDA_SOURCE = str(cuda.SOURCE.relative_to(CUDA.parent))


class BuildKernels(build_ext):
    """g++ for the CPU's kernels, as setuptools does, nvcc for the GPU's, one on each core."""

    def finalize_options(self) -> None:
        """Not one after the other, unless that was asked for."""
        super().finalize_options()
        self.parallel = self.parallel or True

    def build_extension(self, ext: Extension) -> None:
        """Compile one library."""
        if CUDA_SOURCE not in ext.sources:
            # All are of the same sources: in one folder, each would overwrite the others' objects.
            apart = copy.copy(self)
            apart.build_temp = str(Path(self.build_temp) / ext.name)
            super(BuildKernels, apart).build_extension(ext)
            return
        nvcc = cuda.find_nvcc()
        assert nvcc is not None
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            cuda.build_library(nvcc, library)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{nvcc}: {error}") from error


extensions = [
    Extension(
        f"batchllm.native._{target}",
        SOURCES,
        depends=DEPENDS,
        language="c++",
        extra_compile_args=[*FLAGS, *flags],
        optional=True,
    )
    for target, flags in TARGETS.items()
]
extensions.append(
    Extension(
        "batchllm.native._simulator",
        [str(SIMULATOR / "simulate.cpp")],
        depends=[*sorted(map(str, SIMULATOR.glob("*.h"))), "setup.py"],
        language="c++",
        extra_compile_args=SIMULATOR_FLAGS,
        optional=True,
    )
)
if cuda.find_nvcc():
    depends = [str(path.relative_to(CUDA.parent)) for path in cuda.HEADERS]
    depends += ["setup.py", "cuda/cuda_build.py"]
    extensions.insert(  # it takes longest
        0, Extension("batchllm.native._cuda", [CUDA_SOURCE], depends=depends, optional=True)
    )
setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels})
