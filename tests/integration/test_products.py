"""Products with packed weights, by the compiled kernels, against torch's."""

from importlib.machinery import EXTENSION_SUFFIXES

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.models.linear import pack_torch_int8, round_to_int8
from batchllm.models.native_linear import NativeProducts
from batchllm.native.kernels import load_kernels, only_torch_has_tiles, usable_targets

TARGETS = [target for target in usable_targets() if load_kernels(target)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
# Rows, inputs and outputs around the sizes of strips and panels; inputs in groups of four.
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 30).map(lambda n: 4 * n), st.integers(1, 130))


def noise(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(shape, dtype, with_bias):
    rows, inputs, outputs = shape
    bias = noise(outputs, dtype=dtype, seed=2) if with_bias else None
    return (
        noise(rows, inputs, dtype=dtype, seed=0),
        noise(outputs, inputs, dtype=dtype, seed=1),
        bias,
    )


def products(target):
    return NativeProducts(load_kernels(target), tiles=False)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("target", TARGETS)
@given(SHAPES, st.booleans())
@settings(max_examples=60)
def test_equals_the_exact_product(target, dtype, shape, with_bias):
    x, weight, bias = operands(shape, dtype, with_bias)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    got = products(target).pack(weight, bias)(x)
    assert got.dtype == dtype
    # The fallback's oneDNN rounds the product before it adds a bias.
    atol = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(got.double(), exact, atol=atol, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("target", TARGETS)
@given(SHAPES, st.booleans())
@settings(max_examples=60)
def test_int8_equals_torchs_int8(target, dtype, shape, with_bias):
    x, weight, bias = operands(shape, dtype, with_bias)
    expected = pack_torch_int8(weight, bias)(x)
    got = products(target).pack_int8(weight, bias)(x)
    # Half-way between two steps the kernels, which round once, may take the other: one step of x.
    torch.testing.assert_close(got, expected, atol=0.25, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("target", TARGETS)
def test_many_rows_of_many_inputs(target):
    x, weight, bias = operands((700, 1536, 200), torch.bfloat16, True)
    exact = x.float() @ weight.float().T + bias.float()
    got = products(target).pack(weight, bias)(x)
    torch.testing.assert_close(got.float(), exact, atol=0.3, rtol=1.6e-2)
    got = products(target).pack_int8(weight, bias)(x)
    torch.testing.assert_close(got, pack_torch_int8(weight, bias)(x), atol=0.3, rtol=1.6e-2)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [3, 36, 95, 97, 115])  # lines of 64 bytes, a vector, the rest
def test_int8_rows_of_zeros_and_of_no_numbers_stay_with_themselves(target, dtype, bad, place):
    x, weight, _ = operands((3, 116, 50), dtype, False)
    product = products(target).pack_int8(weight, None)
    alone = product(x[2:])
    x[0] = 0
    x[1, place] = bad
    got = product(x)
    assert got[0].tolist() == [0.0] * 50
    assert torch.isnan(got[1]).all()
    assert torch.equal(got[2:], alone)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("place", [0, 31, 32, 95, 97, 115])
def test_int8_rows_are_scaled_by_their_largest_wherever_it_is(target, place):
    x = torch.full((2, 116), 0.25, dtype=torch.bfloat16)
    x[0, place], x[1, place] = -127, 127
    product = products(target).pack_int8(torch.eye(116, dtype=torch.bfloat16), None)
    expected = torch.zeros(2, 116)  # a step is 1: a quarter is none
    expected[:, place] = torch.tensor([-127.0, 127])
    assert product(x).tolist() == expected.tolist()


def test_rounding_keeps_every_value_within_half_a_step():
    sizes = torch.tensor([[0.0], [1e-6], [1], [50], [3e4]])
    rows = noise(5, 64, dtype=torch.float32, seed=0) * sizes
    rounded, scales = round_to_int8(rows)
    assert rounded.abs().amax(dim=1).tolist() == [0, 127, 127, 127, 127]
    error = (rounded * scales[:, None] - rows).abs().amax(dim=1)
    assert (error <= 0.5001 * scales).all()


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 10, 9)])
@pytest.mark.parametrize("target", TARGETS)
def test_sizes_that_the_kernels_do_not_know_go_to_torch(target, shape):
    x, weight, bias = operands(shape, torch.bfloat16, True)
    exact = x.float() @ weight.float().T + bias.float()
    for pack, most in ((products(target).pack, 0.05), (products(target).pack_int8, 0.3)):
        torch.testing.assert_close(pack(weight, bias)(x).float(), exact, atol=most, rtol=0.05)


def test_tiles_are_left_to_torch_where_no_kernels_for_them_were_compiled(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : avx512f amx_tile amx_bf16\n")
    assert only_torch_has_tiles(cpuinfo, home=tmp_path)
    (tmp_path / f"_amx{EXTENSION_SUFFIXES[0]}").touch()
    assert not only_torch_has_tiles(cpuinfo, home=tmp_path)
    cpuinfo.write_text("flags : avx512f\n")
    assert not only_torch_has_tiles(cpuinfo, home=tmp_path / "none")
