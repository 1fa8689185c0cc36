"""CUDA sources compiled for the emulation, which needs a C++ compiler and no GPU."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Fibers jump between stacks, which a fortified longjmp takes for an attack.
_FLAGS = ["-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-fPIC"]


def compile_emulated(source, directory):
    """A shared library of `source`, a path below the project's root."""
    library = directory / f"{Path(source).stem}.so"
    command = ["g++", *_FLAGS, "-Wno-unknown-pragmas", "-shared", "-x", "c++", str(ROOT / source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library
