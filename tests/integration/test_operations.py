"""The compiled operations and packed products against torch's own."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.models.linear import Linear, can_pack, pack_torch
from batchllm.models.native_operations import NativeOperations
from batchllm.models.operations import TorchOperations
from batchllm.native.kernels import load_kernels, usable_targets

TARGETS = [target for target in usable_targets() if load_kernels(target)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}  # bfloat16: two roundings of 2^-8
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 70))


def noise(*shape, dtype, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("target", TARGETS)
@given(SHAPES, st.booleans())
@settings(max_examples=30)
def test_rms_norm_adds_in_place_and_equals_torch(target, dtype, shape, with_delta):
    hidden, weight = noise(*shape, dtype=dtype), noise(shape[1], dtype=dtype, seed=1)
    delta = noise(*shape, dtype=dtype, seed=2) if with_delta else None
    exact = hidden.clone()
    got = NativeOperations(load_kernels(target)).add_rms_norm(hidden, delta, weight, 1e-5)
    TorchOperations().add_rms_norm(exact, delta, weight, 1e-5)
    assert torch.equal(hidden, exact)
    # In float32, so that torch's own roundings of bfloat16 are not the yardstick.
    expected = TorchOperations().add_rms_norm(exact.float(), None, weight.float(), 1e-5)
    torch.testing.assert_close(got.float(), expected, atol=1e-4, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("target", TARGETS)
@given(SHAPES, st.sampled_from([0.1, 3.0, 60.0]))
@settings(max_examples=30)
def test_gate_equals_torch_for_small_and_large_values(target, dtype, shape, scale):
    gate_up = noise(shape[0], 2 * shape[1], dtype=dtype) * scale
    got = NativeOperations(load_kernels(target)).silu_and_multiply(gate_up)
    expected = TorchOperations().silu_and_multiply(gate_up.float())
    torch.testing.assert_close(got.float(), expected, atol=1e-6, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("target", TARGETS)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=37, max_size=37), min_size=1, max_size=5))
@settings(max_examples=50)
def test_argmax_is_the_first_of_the_largest(target, dtype, rows):
    logits = torch.tensor(rows).to(dtype)
    got = NativeOperations(load_kernels(target)).argmax(logits)
    assert got.tolist() == np.argmax(np.array(rows), axis=1).tolist()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("target", TARGETS)
@given(st.data())
@settings(max_examples=50)
def test_argmax_finds_none_where_logits_are_unusable_as_torch_does(target, dtype, data):
    values = st.sampled_from([1.0, 2.0, -torch.inf] * 9 + [torch.inf, torch.nan])
    width = data.draw(st.integers(1, 40))
    row = st.lists(values, min_size=width, max_size=width)
    logits = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=5))).to(dtype)
    usable = ~logits.isnan().any(1) & logits.amax(1).isfinite()
    expected = torch.where(usable, logits.argmax(1), -1).tolist()
    assert NativeOperations(load_kernels(target)).argmax(logits).tolist() == expected
    assert TorchOperations().argmax(logits).tolist() == expected


@pytest.mark.skipif(not can_pack(), reason="this torch packs no weights here")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 17, 300])
def test_a_packed_product_equals_the_plain_one_and_keeps_no_second_weight(rows, bias):
    linear = Linear(48, 80, dtype=torch.bfloat16, bias=bias)
    linear.weight.copy_(noise(80, 48, dtype=torch.bfloat16))
    if bias:
        linear.bias.copy_(noise(80, dtype=torch.bfloat16, seed=1))
    x = noise(rows, 48, dtype=torch.bfloat16, seed=2)
    plain = linear(x)
    linear.pack(pack_torch)
    assert linear.weight is None
    torch.testing.assert_close(linear(x), plain, atol=0.25, rtol=1.6e-2)


@pytest.mark.skipif(not TARGETS, reason="no kernels were compiled")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_there_is_one_openmp_in_the_process():
    # In a process of its own: what tests import may bring another.
    code = (
        "from batchllm.native.kernels import load_kernels as load\n"
        "assert load() is not None\n"
        "print(open('/proc/self/maps').read())"
    )
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    runtimes = re.findall(r"/\S*lib(?:gomp|omp|iomp5)\b\S*", maps.stdout)
    assert len(set(runtimes)) == 1, set(runtimes)


def test_targets_go_by_the_processors_flags(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu avx2 fma\n")
    assert set(usable_targets(cpuinfo)) <= {"avx2", "portable"}
    assert usable_targets(cpuinfo, home=tmp_path) == []
    assert usable_targets(tmp_path / "none") in (["portable"], [])


@pytest.mark.skipif(not TARGETS, reason="no kernels were compiled")
def test_slow_bfloat16_comes_after_floats(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    flags = "avx2 fma avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16"
    orders = {}
    for vendor in ("AuthenticAMD", "GenuineIntel"):
        cpuinfo.write_text(f"vendor_id : {vendor}\nflags : {flags}\n")
        orders[vendor] = usable_targets(cpuinfo)[:3]
    if "avx512_bf16" not in orders["AuthenticAMD"]:
        pytest.skip("the compiler here does not know bfloat16")
    assert orders["AuthenticAMD"] == ["avx512_bf16", "avx512_vnni", "avx512"]
    assert orders["GenuineIntel"] == ["avx512_vnni", "avx512_bf16", "avx512"]
