"""Compiles the CPU kernels, once for each kind of processor; without a compiler, does without.

Everything else about the package is in pyproject.toml. No headers but the compiler's own are used,
and OpenMP is not linked: at run time torch's is there (batchllm/native/kernels.py).
"""

import platform

from setuptools import Extension, setup

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

setup(
    ext_modules=[
        Extension(
            f"batchllm.native._{target}",
            SOURCES,
            depends=HEADERS,
            language="c++",
            extra_compile_args=[*FLAGS, *flags],
            optional=True,  # where it cannot be compiled the tool works without, slower
        )
        for target, flags in TARGETS.items()
    ]
)
