"""Each library of kernels runs on the processors that it is for."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from batchllm.native import kernels

ROOT = Path(__file__).parents[2]
# What a processor without the next kind's instructions does not know, in objdump's spelling.
BFLOAT16 = r"\bv(dpbf16ps|cvtneps2bf16|cvtne2ps2bf16)"
DOT_PRODUCTS = r"\bvpdp(bus|wss)ds?\b"
MASKS_AND_WIDE = r"%(zmm|k[0-7]|[xy]mm(1[6-9]|2\d|3[01]))\b|%zmm"
PORTABLE = [BFLOAT16, DOT_PRODUCTS, MASKS_AND_WIDE, r"%ymm", r"\bv[a-z]+\d*[a-z]* .*%xmm"]
UNKNOWN = {
    "portable": PORTABLE,
    "simulator": PORTABLE,
    "avx2": [BFLOAT16, DOT_PRODUCTS, MASKS_AND_WIDE],
    "avx512": [BFLOAT16, DOT_PRODUCTS],
    "avx512_vnni": [BFLOAT16],
}
FAKE_COMPILER = """\
#!/bin/sh
echo "$@" >>"$CALLS"
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then : >"$2"; fi
    shift
done
"""


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump (binutils)")
@pytest.mark.parametrize("target", UNKNOWN)
def test_no_instruction_is_beyond_the_processor(target: str) -> None:
    built = {path.name.split(".")[0]: path for path in Path(kernels.__file__).parent.glob("*.so")}
    if not built and shutil.which("g++") is None:
        pytest.skip("no compiler, so no kernels")
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(built[f"_{target}"])]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = listing.splitlines()
    assert len(lines) > 1000
    unknown = re.compile("|".join(UNKNOWN[target]))
    assert [line for line in lines if unknown.search(line)] == []


def test_no_object_is_compiled_for_two_processors(tmp_path: Path) -> None:
    compiler, nvcc, calls = tmp_path / "g++", tmp_path / "bin" / "nvcc", tmp_path / "calls"
    nvcc.parent.mkdir()
    for path in (compiler, nvcc):
        path.write_text(FAKE_COMPILER)
        path.chmod(0o755)
    environment = os.environ | {
        "CC": str(compiler),
        "CXX": str(compiler),
        "CALLS": str(calls),
        "CUDA_HOME": str(tmp_path),
    }
    built = [f"--build-temp={tmp_path}/objects", f"--build-lib={tmp_path}/libraries"]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *built],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
    )
    lines = [line.split() for line in calls.read_text().splitlines()]
    objects = [words[words.index("-o") + 1] for words in lines if "-c" in words]
    assert len(objects) >= 3 and len(set(objects)) == len(objects)
    linked = [word for words in lines if "-c" not in words for word in words if word[-2:] == ".o"]
    assert sorted(linked) == sorted(objects)
