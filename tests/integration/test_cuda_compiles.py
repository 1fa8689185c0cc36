"""nvcc compiles cuda/ for every architecture, where there is an nvcc."""

import importlib.util
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "cuda" / "cuda_build.py"


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("cuda_build", BUILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8batchllm16attention_kernelILi128ELNS_6KvTypeE2EEEvNS_\
13AttentionStepENS_14AttentionLayerE' for 'sm_90'
ptxas info    : Function properties for _ZN8batchllm16attention_kernelILi128ELNS_6KvTypeE2EEEv
    24 bytes stack frame, 20 bytes spill stores, 144 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 24 bytes cumulative stack size
ptxas info    : Compiling entry function '_ZN8batchllm12merge_kernelILi64EEEvNS_13AttentionStepE' \
for 'sm_90'
ptxas info    : Function properties for _ZN8batchllm12merge_kernelILi64EEEvNS_13AttentionStepE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 56 registers, used 0 barriers
"""


def test_what_ptxas_says_is_read(build):
    assert build.read_resources(REPORT, "sm_90") == [
        build.Resources("attention", 128, "int8", "sm_90", 168, 24, 20, 144),
        build.Resources("merge", 64, "any", "sm_90", 56, 0, 0, 0),
    ]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
def test_compiles_without_a_warning_and_fits(build, architecture):
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc here")
    kernels = build.compile_for(nvcc, architecture)
    assert {(k.head_dim, k.kv_type) for k in kernels if k.kernel == "attention"} == {
        (head_dim, kv_type)
        for head_dim in (64, 96, 128)
        for kv_type in ("bfloat16", "float8", "int8")
    }
    for kernel in kernels:
        assert kernel.registers <= 168, kernel  # three blocks on a multiprocessor
        assert kernel.stack <= 128, kernel
