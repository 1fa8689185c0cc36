"""The kernels for matrix tiles, whose instructions are emulated where the processor has none."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_checks import (
    TREES,
    check,
    check_values_of_all_sizes,
    deep_tree,
    poisoned_rows,
    tolerance_of,
)
from block_models import OneByOne, attend, make
from builders import tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchllm.attention.native import NativeBackend
from batchllm.cache import block_pool
from batchllm.models.linear import pack_torch_int8
from batchllm.models.native_linear import NativeProducts
from batchllm.models.native_operations import NativeOperations
from batchllm.models.operations import TorchOperations
from batchllm.native.kernels import NativeKernels, load_kernels, usable_targets, whole_strips

SOURCES = Path(__file__).parents[2] / "batchllm" / "native" / "src"
# Rows around whole and half tiles and strips; inputs of whole tiles in bfloat16 and mostly in int8;
# outputs around panels.
KV_DTYPES = st.sampled_from([None, torch.int8])
SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 5).map(lambda n: 32 * n), st.integers(1, 130))


@pytest.fixture(scope="module", params=["emulated", "processor"])
def kernels(request, tmp_path_factory):
    """The kernels with emulated tiles, and as this processor runs them where it has tiles."""
    if request.param == "processor":
        if "amx" not in usable_targets():
            pytest.skip("no matrix tiles here")
        return load_kernels("amx")
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    library = tmp_path_factory.mktemp("tiles") / "emulated.so"
    sources = map(str, sorted(SOURCES.glob("*.cpp")))
    flags = ["-std=c++17", "-O1", "-fopenmp", "-fPIC", "-shared", "-w", "-Wno-psabi"]
    define = "-DBATCHLLM_EMULATED_TILES"
    subprocess.run(["g++", *flags, define, *sources, "-o", str(library)], check=True)
    return NativeKernels("amx", library)


def noise(*shape, dtype=torch.bfloat16, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(shape, with_bias):
    rows, inputs, outputs = shape
    bias = noise(outputs, seed=2) if with_bias else None
    return noise(rows, inputs, seed=0), noise(outputs, inputs, seed=1), bias


def exact_product(x, weight, bias):
    return x.double() @ weight.double().T + (0 if bias is None else bias.double())


@given(SHAPES, st.booleans(), st.booleans())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_products_equal_the_exact_ones(kernels, shape, with_bias, as_float):
    x, weight, bias = operands(shape, with_bias)
    own = NativeProducts(kernels, tiles=False)
    exact = exact_product(x, weight, bias)
    torch.testing.assert_close(own.pack(weight, bias)(x).double(), exact, atol=0.1, rtol=1.6e-2)
    if as_float:
        x = x.float()
    expected = pack_torch_int8(weight, bias)(x)
    torch.testing.assert_close(own.pack_int8(weight, bias)(x), expected, atol=0.4, rtol=1.6e-2)


@given(SHAPES, st.booleans(), st.sampled_from([None, "int8"]))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_gated_products_equal_a_product_and_its_gate(kernels, shape, with_bias, quantization):
    rows, inputs, outputs = shape
    x, weight, bias = operands((rows, inputs, 2 * outputs), with_bias)
    own = NativeProducts(kernels, tiles=False)
    gated = own.pack_gated(weight, bias, quantization)
    fits = outputs % 16 == 0 and (quantization is None or inputs % 64 == 0)
    assert (gated is not None) == fits
    if gated is None:
        return
    gate_up = exact_product(x, weight, bias).float()
    if quantization == "int8":
        gate_up = pack_torch_int8(weight, bias)(x).float()
    got, expected = gated(x), TorchOperations().silu_and_multiply(gate_up)
    assert got.shape == (rows, outputs) and got.dtype == x.dtype
    torch.testing.assert_close(got.float(), expected, atol=3.0, rtol=3e-2)


def in_strips(x):
    """Rows [rows, size] as they lie in strips, with zeros for those of the last that are none."""
    chunk = 64 // x.element_size()
    padded = torch.zeros(whole_strips(len(x)), x.shape[1], dtype=x.dtype)
    padded[: len(x)] = x
    return padded.view(-1, 32, x.shape[1] // chunk, chunk).transpose(1, 2).reshape(padded.shape)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("shape", [(1, 64, 32), (40, 192, 96), (530, 1344, 64)])
def test_a_product_of_strips_is_that_of_rows(kernels, shape, quantization):
    x, weight, bias = operands(shape, True)
    own = NativeProducts(kernels, tiles=False)
    product = (own.pack if quantization is None else own.pack_int8)(weight, bias)
    found = product.in_strips(in_strips(x), len(x))
    strips = torch.arange(found.numel()).view(found.shape) // 32 % 32  # of 32 rows, which
    row = torch.arange(found.numel()).view(found.shape) // (32 * shape[2]) * 32 + strips
    assert torch.equal(found[row < len(x)], in_strips(product(x))[row < len(x)])
    odd = own.pack(weight[:, :34], None)
    assert odd.in_strips(in_strips(x), len(x)) is None


def test_gates_and_ups_keep_their_places(kernels):
    x = torch.eye(32).bfloat16()
    gates = torch.full((48, 32), 20.0)  # silu(20) is 20
    ups = torch.arange(48.0)[:, None].expand(48, 32)
    weight = torch.cat([gates, ups]).bfloat16()
    gated = NativeProducts(kernels, tiles=False).pack_gated(weight, None, None)
    assert gated is not None
    assert torch.equal(gated(x).float(), 20 * torch.arange(48.0).expand(32, 48).bfloat16().float())


@pytest.mark.parametrize("inputs", [34, 100])
def test_inputs_that_are_no_whole_tiles_go_through_vectors(kernels, inputs):
    x, weight, bias = operands((37, inputs, 70), True)
    got = NativeProducts(kernels, tiles=False).pack(weight, bias)(x)
    exact = exact_product(x, weight, bias)
    torch.testing.assert_close(got.double(), exact, atol=0.1, rtol=1.6e-2)


# Rows that threads divide, in chunks of 1, 2 and 3 (in int8 1 and 2), with a last strip of few or
# of one; rows that are few and so long that a panel does not meet them all, or that a panel is
# fetched while it is multiplied; outputs far apart; many rows of a single tile (in int8, in
# bfloat16). Of 1344 inputs in bfloat16, and of 2560 in int8, only chunks of panels stay anywhere.
MANY = [(600, 640, 70), (545, 672, 300), (530, 1344, 100), (1100, 1344, 70), (513, 96, 1600)]
LONG = [(70, 12288, 40), (550, 2560, 40), (9, 4096, 100), (20, 4096, 70), (200, 64, 16400)]
SHORT = [(7000, 64, 64), (7000, 32, 64)]


@pytest.mark.parametrize("shape", [*MANY, *LONG, *SHORT])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_rows_and_long_ones(kernels, shape, threads):
    x, weight, bias = operands(shape, True)
    own = NativeProducts(kernels, tiles=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        plain, rounded = own.pack(weight, bias)(x), own.pack_int8(weight, bias)(x)
    finally:
        torch.set_num_threads(before)
    exact = exact_product(x, weight, bias)
    torch.testing.assert_close(plain.double(), exact, atol=0.2, rtol=1.6e-2)
    expected = pack_torch_int8(weight, bias)(x)
    torch.testing.assert_close(rounded, expected, atol=0.8, rtol=1.6e-2)


@pytest.mark.parametrize("outputs", [1, 31, 32, 100])
@pytest.mark.parametrize("rows", [1, 16, 40, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_largest_output_without_the_outputs(kernels, rows, outputs, dtype):
    x, weight, bias = operands((rows, 64, outputs), True)
    x, weight, bias = x.sign().to(dtype), (weight * 2).round(), (bias * 8).round()
    for each in (weight, bias):  # so that each row's largest is there twice
        each[outputs // 2 :] = each[: outputs - outputs // 2].clone()
    own = NativeProducts(kernels, tiles=False)
    products = [own.pack_int8(weight, bias)]
    if dtype == torch.bfloat16:
        products.append(own.pack(weight, bias))
    for product in products:
        found = product.argmax(x)
        assert found.tolist() == TorchOperations().argmax(product(x)).tolist()
        assert outputs < 3 or len(set(found.tolist())) > min(rows, 4) // 2


def test_the_largest_output_of_long_rows(kernels):
    x, weight, bias = operands((600, 2560, 100), True)
    own = NativeProducts(kernels, tiles=False)
    for product in (own.pack(weight, bias), own.pack_int8(weight, bias)):
        assert product.argmax(x).tolist() == TorchOperations().argmax(product(x)).tolist()


def test_no_rows_at_all(kernels):
    x, weight, _ = operands((0, 64, 100), False)
    product = NativeProducts(kernels, tiles=False).pack(weight, None)
    assert product(x).shape == (0, 100) and product.argmax(x).shape == (0,)


def test_what_does_not_fit_tiles_writes_its_outputs(kernels):
    own = NativeProducts(kernels, tiles=False)
    x, weight, _ = operands((5, 34, 70), False)
    assert own.pack(weight, None).argmax(x) is None
    x, weight, _ = operands((5, 64, 70), False)
    assert own.pack(weight.float(), None).argmax(x.float()) is None


def test_the_first_of_equal_outputs_whichever_thread_is_done_first(kernels):
    x, weight, _ = operands((2, 64, 2000), False)
    x[1] = 0  # all are
    weight[37] = weight[1990] = 9 * x[0].sign()
    product = NativeProducts(kernels, tiles=False).pack(weight, None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert {tuple(product.argmax(x).tolist()) for _ in range(100)} == {(37, 0)}
    finally:
        torch.set_num_threads(before)


def test_no_output_is_the_largest_where_one_is_no_number(kernels):
    x, weight, bias = operands((50, 64, 100), True)
    product = NativeProducts(kernels, tiles=False).pack(weight, bias)
    expected = TorchOperations().argmax(product(x))
    for row, bad in ((3, float("nan")), (20, float("inf")), (40, -float("inf"))):
        x[row, 7] = bad
        expected[row] = -1
    assert (TorchOperations().argmax(product(x)) == expected).all()
    assert (product.argmax(x) == expected).all()
    bias[5], bias[60] = float("nan"), 100.0
    assert (NativeProducts(kernels, tiles=False).pack(weight, bias).argmax(x) == -1).all()
    infinite = torch.full((100,), -float("inf")).bfloat16()
    assert (NativeProducts(kernels, tiles=False).pack(weight, infinite).argmax(x) == -1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_of_no_numbers_stay_with_themselves(kernels, bad):
    x, weight, _ = operands((40, 64, 50), False)
    own = NativeProducts(kernels, tiles=False)
    for product in (own.pack(weight, None), own.pack_int8(weight, None)):
        alone = product(x)
        x[21, 5] = bad
        got = product(x)
        x[21, 5] = 0
        assert not got[21].isfinite().any()
        others = torch.arange(40) != 21
        assert torch.equal(got[others], alone[others])


@pytest.mark.parametrize("inputs", [128, 672, 1344])
def test_a_row_is_the_same_whatever_rows_are_beside_it(kernels, inputs):
    x, weight, _ = operands((600, inputs, 100), False)
    product = NativeProducts(kernels, tiles=False).pack(weight, None)
    whole = product(x)
    for count in (1, 15, 16, 17, 31, 32, 33, 64, 65, 255, 512):
        assert torch.equal(product(x[:count].contiguous()), whole[:count])


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [96, 128])  # in int8 one is no whole tiles: rows, not strips
def test_what_lies_in_strips_between_products(kernels, dtype, quantization, size):
    config = tiny_config(intermediate_size=size, num_hidden_layers=3, mlp_bias=True)
    whole, apart = (
        make(kind, config, kernels, dtype, quantization) for kind in (NativeOperations, OneByOne)
    )
    with torch.inference_mode():
        for count in (1, 31, 33, 70):
            tokens, rows = torch.arange(count) * 3 % 250, torch.arange(count)
            expected = apart.forward(tokens, attend, rows)
            assert torch.equal(whole.forward(tokens, attend, rows), expected)
            assert expected.std() > 0.01


@given(
    TREES,
    st.integers(1, 50),
    st.sampled_from([16, 32, 512]),
    st.sampled_from(
        [(1, 1, 32), (2, 3, 64), (1, 8, 96), (3, 17, 32), (2, 3, 48), (1, 9, 128), (1, 1, 320)]
    ),
    KV_DTYPES,
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_attention_equals_reference_on_random_trees(
    kernels, rows, budget, block_size, shape, kv_dtype
):
    kv_heads, group, head_dim = shape
    done = check(
        rows,
        NativeBackend(block_size, head_dim, kernels),
        block_size=block_size,
        budget=budget,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        tolerance=tolerance_of(torch.bfloat16, kv_dtype),
        kv_dtype=kv_dtype,
    )
    assert done.steps > 0


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("rows", [deep_tree(), poisoned_rows()], ids=["deep", "poisoned"])
def test_attention_equals_reference_on_long_and_on_poisoned_rows(
    kernels, block_size, rows, kv_dtype
):
    done = check(
        rows,
        NativeBackend(block_size, 64, kernels),
        block_size=block_size,
        budget=100,
        head_dim=64,
        dtype=torch.bfloat16,
        tolerance=tolerance_of(torch.bfloat16, kv_dtype),
        kv_dtype=kv_dtype,
    )
    assert done.steps > 5


@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
def test_blocks_that_are_no_neighbours_in_memory(kernels, monkeypatch, kv_dtype):
    def scattered(num_blocks):
        return np.random.default_rng(0).permutation(num_blocks).astype(np.int32)

    monkeypatch.setattr(block_pool, "_in_order", scattered)
    done = check(
        deep_tree(),
        NativeBackend(16, 64, kernels),
        block_size=16,
        budget=100,
        head_dim=64,
        dtype=torch.bfloat16,
        tolerance=tolerance_of(torch.bfloat16, kv_dtype),
        kv_dtype=kv_dtype,
    )
    assert done.steps > 5


def test_values_of_all_sizes_in_int8(kernels):
    check_values_of_all_sizes(NativeBackend(16, 64, kernels), torch.bfloat16)
