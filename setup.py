"""Compiles the kernels: the CPU's once for each kind of processor, the GPU's where there is nvcc.

Everything else about the package is in pyproject.toml. No headers but the compilers' own are used;
OpenMP is not linked: at run time torch's is there (batchllm/native/kernels.py). What cannot be
compiled is left out, and the tool works without, slower.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
TARGETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    TARGETS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": AVX512,
        "avx512_vnni": [*AVX512, "-mavx512vnni"],
        "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
    }
SOURCES = [f"batchllm/native/src/{name}.cpp" for name in ("attention", "elementwise", "linear")]
HEADERS = [source.replace(".cpp", ".h") for source in SOURCES]
HEADERS += [f"batchllm/native/src/{name}.h" for name in ("ahead", "products", "simd")]
# The warnings are about GCC's own intrinsics.
QUIET = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
FLAGS = ["-std=c++17", "-O3", "-g0", "-fopenmp", "-fno-math-errno", *QUIET]

CUDA_SOURCE = "cuda/csrc/attention.cu"
CUDA_HEADERS = [str(path) for path in sorted(Path("cuda/include/batchllm").glob("*.h"))]
CUDA_ARCHITECTURES = ("80", "90", "100")


def find_nvcc() -> str | None:
    """The CUDA compiler: in CUDA_HOME, on the path, or where its installer puts it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    named = [f"{home}/bin/nvcc" for home in homes if home]
    for candidate in [*named, "nvcc", "/usr/local/cuda/bin/nvcc"]:
        if found := shutil.which(candidate):
            return found
    return None


def cuda_targets(nvcc: str) -> list[str]:
    """Machine code for each architecture that this nvcc knows, and PTX for those to come."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in listed.stdout.split()]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    return [*targets, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


class BuildKernels(build_ext):
    """g++ for the CPU's kernels, as setuptools does, nvcc for the GPU's."""

    def build_extension(self, ext: Extension) -> None:
        """Compile one library."""
        if CUDA_SOURCE not in ext.sources:
            super().build_extension(ext)
            return
        nvcc = find_nvcc()
        assert nvcc is not None
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", CUDA_SOURCE]
        try:
            subprocess.run([*command, *cuda_targets(nvcc), "-o", str(library)], check=True)
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            raise CompileError(f"{nvcc}: {error}") from error


extensions = [
    Extension(
        f"batchllm.native._{target}",
        SOURCES,
        depends=HEADERS,
        language="c++",
        extra_compile_args=[*FLAGS, *flags],
        optional=True,
    )
    for target, flags in TARGETS.items()
]
if find_nvcc():
    extensions.append(
        Extension("batchllm.native._cuda", [CUDA_SOURCE], depends=CUDA_HEADERS, optional=True)
    )
setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels})
