"""Compiling the kernels of cuda/ with nvcc, for setup.py and for those who look at what it made.

python cuda/cuda_build.py [--write]     registers, spills and shared memory of every kernel;
--write keeps them in cuda/RESOURCES.md
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "csrc" / "attention.cu"
HEADERS = sorted((HERE / "include" / "batchllm").glob("*.h"))
ARCHITECTURES = ("80", "90", "100")
CHECKED = ("sm_80", "sm_90a", "sm_100")
_FLAGS = ["-std=c++17", "-O3"]
_KV_TYPES = ("bfloat16", "float8", "int8")


@dataclass(frozen=True, slots=True, order=True)
class Resources:
    """What one kernel takes; `stack` and spills in bytes a thread."""

    kernel: str
    head_dim: int
    kv_type: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def find_nvcc() -> str | None:
    """The CUDA compiler: in CUDA_HOME, on the path, or where its installer puts it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    named = [f"{home}/bin/nvcc" for home in homes if home]
    for candidate in [*named, "nvcc", "/usr/local/cuda/bin/nvcc"]:
        if found := shutil.which(candidate):
            return found
    return None


def build_library(nvcc: str, library: Path) -> None:
    """Machine code for each architecture that this nvcc knows, and PTX for those to come.

    BATCHLLM_CUDA_ARCHITECTURES, like "90" or "80,90", says which instead.

    Raises:
        subprocess.CalledProcessError: it could not be compiled.
    """
    command = [nvcc, "--list-gpu-arch"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    wanted = os.environ.get("BATCHLLM_CUDA_ARCHITECTURES")
    chosen = wanted.split(",") if wanted else ARCHITECTURES
    known = [name for name in chosen if f"compute_{name}" in listed]
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in known]
    targets += [f"-gencode=arch=compute_{name},code=compute_{name}" for name in known[-1:]]
    shared = ["-shared", "-Xcompiler", "-fPIC", str(SOURCE), "-o", str(library)]
    subprocess.run([nvcc, *_FLAGS, *targets, *shared], check=True)


def compile_for(nvcc: str, architecture: str) -> list[Resources]:
    """Compile for one architecture, warnings as errors, and say what the kernels take.

    Raises:
        subprocess.CalledProcessError: it could not be compiled, or not without a warning.
    """
    with tempfile.TemporaryDirectory() as directory:
        output = ["-cubin", "-o", f"{directory}/kernels.cubin", str(SOURCE)]
        flags = [*_FLAGS, f"-arch={architecture}", "--resource-usage", "-Werror", "all-warnings"]
        done = subprocess.run([nvcc, *flags, *output], capture_output=True, text=True, check=True)
    return read_resources(done.stderr, architecture)


def read_resources(report: str, architecture: str) -> list[Resources]:
    """What ptxas says of each kernel, as Resources."""
    found = []
    for part in report.split("Compiling entry function")[1:]:
        name = re.search(r"\d([a-z_]+)_kernelILi(\d+)E(?:LNS_6KvTypeE(\d)E)?", part)
        registers = re.search(r"Used (\d+) registers", part)
        frame = re.search(r"(\d+) bytes stack.*?(\d+) bytes spill st.*?(\d+) bytes spill l", part)
        assert name and registers and frame, part
        found.append(
            Resources(
                name[1],
                int(name[2]),
                _KV_TYPES[int(name[3])] if name[3] else "any",
                architecture,
                int(registers[1]),
                *map(int, frame.groups()),
            )
        )
    return sorted(found)


def as_table(resources: list[Resources]) -> str:
    """In Markdown, the attention kernels first."""
    lines = [
        "| kernel | head_dim | KV | architecture | registers | stack | spilled: stores, loads |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.kernel} | {r.head_dim} | {r.kv_type} | {r.architecture} | {r.registers} | {r.stack} "
        f"| {r.spill_stores}, {r.spill_loads} |"
        for r in resources
    ]
    return "\n".join(lines)


def main() -> None:
    """Compile for all architectures and print, or keep, what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into cuda/RESOURCES.md")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("no nvcc found; set CUDA_HOME or put it on the PATH")
    resources = sorted(r for name in CHECKED for r in compile_for(nvcc, name))
    shown = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release ([\d.]+)", shown)
    text = (
        "# What the kernels take\n\n"
        f"`python cuda/cuda_build.py --write`, nvcc {version[1] if version else 'unknown'}; bytes "
        "are a thread's. The attention kernel may have 168 registers, so that three blocks fit a "
        f"multiprocessor.\n\n{as_table(resources)}\n"
    )
    print(text)
    if arguments.write:
        (HERE / "RESOURCES.md").write_text(text)


if __name__ == "__main__":
    main()
