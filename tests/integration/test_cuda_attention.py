"""The `cuda` kernel's own lines, run by the emulation, against the reference."""

import pytest
import torch
from attention_checks import TREES, check, check_tree, deep_tree, long_rows, poisoned_rows
from attention_trees import trees
from emulated import compile_emulated
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.attention.backend import Heads
from batchllm.attention.cuda import CudaBackend
from batchllm.attention.cuda_library import CudaLibrary
from batchllm.attention.cuda_plan import UnitCosts
from batchllm.errors import UsageError

BLOCK_SIZE = 16
# kv heads, query heads of each, head_dim
SHAPES = [(1, 1, 64), (2, 3, 64), (3, 4, 96), (1, 8, 128), (2, 5, 64), (1, 17, 64), (2, 1, 128)]
COSTS = [
    UnitCosts(),
    UnitCosts(partial_row=0.0, unit=0.0, least_keys=1),  # shared and cut wherever possible
    UnitCosts(partial_row=1e9),  # nothing shared
    UnitCosts(partial_row=0.0, unit=0.0, least_keys=70),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    # The reference's small operations are the faster for having no other threads to wait for.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield _library(tmp_path_factory)
    torch.set_num_threads(threads)


def _library(tmp_path_factory):
    return CudaLibrary(compile_emulated("cuda/csrc/attention.cu", tmp_path_factory.mktemp("cuda")))


def heads(kv_heads, group, head_dim):
    return Heads(kv_heads * group, kv_heads, head_dim)


def hold(library, rows, shape, *, budget=60, costs=None, block_size=BLOCK_SIZE, kv_dtype=None):
    kv_heads, group, head_dim = shape
    backend = CudaBackend(
        block_size, heads(*shape), library, costs=costs, kv_dtype=kv_dtype or torch.bfloat16
    )
    return check(
        rows,
        backend,
        block_size=block_size,
        budget=budget,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        tolerance=tolerance(kv_dtype),
        kv_dtype=kv_dtype,
    )


KV_DTYPES = [None, torch.float8_e4m3fn, torch.int8]


def tolerance(kv_dtype):
    """Values reach 8, where bfloat16 goes by 1/32; with scales even a weight of 1 is rounded."""
    return 6e-2 if kv_dtype == torch.int8 else 3e-2


@given(TREES, st.integers(1, 50), st.sampled_from(SHAPES), st.sampled_from(COSTS))
@settings(max_examples=8, deadline=None)
def test_equals_reference_as_tables_are_answered(library, rows, budget, shape, costs):
    hold(library, rows, shape, budget=budget, costs=costs)


def random_trees(count):
    def decorate(test):
        sizes = {"shape": st.sampled_from(SHAPES), "costs": st.sampled_from(COSTS)}
        sizes["kv_dtype"] = st.sampled_from(KV_DTYPES)
        sizes["items"] = st.sampled_from([4, 16, 64]).flatmap(
            lambda size: st.tuples(st.just(size), trees(size))
        )
        return settings(max_examples=count, deadline=None)(given(**sizes)(test))

    return decorate


def hold_tree(library, shape, costs, kv_dtype, items):
    (block_size, items), (kv_heads, group, head_dim) = items, shape
    backend = CudaBackend(
        block_size, heads(*shape), library, costs=costs, kv_dtype=kv_dtype or torch.bfloat16
    )
    check_tree(
        items,
        backend,
        block_size=block_size,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        tolerance=tolerance(kv_dtype),
        device="cpu",
        kv_dtype=kv_dtype,
    )


@random_trees(20)
def test_equals_reference_on_random_trees(library, shape, costs, kv_dtype, items):
    hold_tree(library, shape, costs, kv_dtype, items)


@pytest.mark.slow
@random_trees(200)
def test_equals_reference_on_many_random_trees(library, shape, costs, kv_dtype, items):
    hold_tree(library, shape, costs, kv_dtype, items)


@pytest.mark.parametrize("costs", COSTS[:2], ids=["default", "all-shared"])
def test_equals_reference_on_deep_trees_without_bank_conflicts(library, costs):
    assert hold(library, deep_tree()[:12], (2, 4, 64), costs=costs).steps > 5
    assert library.bank_conflicts() == 0


@pytest.mark.slow
@pytest.mark.parametrize("costs", COSTS, ids=["default", "all-shared", "none-shared", "cut"])
def test_equals_reference_on_long_contexts(library, costs):
    assert hold(library, long_rows(), (1, 3, 128), budget=200, costs=costs).steps > 5


@pytest.mark.parametrize("kv_dtype", KV_DTYPES[1:], ids=["float8", "int8"])
def test_equals_reference_with_eight_bits_without_bank_conflicts(library, kv_dtype):
    assert hold(library, deep_tree()[:12], (2, 4, 64), kv_dtype=kv_dtype).steps > 5
    assert library.bank_conflicts() == 0


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=["bfloat16", "float8", "int8"])
def test_nans_stay_with_the_rows_that_see_them(library, kv_dtype):
    rows = poisoned_rows()[::2]
    assert hold(library, rows, (1, 4, 64), costs=COSTS[1], kv_dtype=kv_dtype).poisoned > 10


@pytest.mark.parametrize(
    "block_size, shape, why",
    [
        (48, (1, 1, 64), "block_size"),
        (16, (1, 1, 80), "head_dim"),
        (16, (1, 65, 64), "query heads"),
        (2, (1, 1, 64), "int8"),
    ],
)
def test_refuses_what_the_kernel_cannot_do(library, block_size, shape, why):
    with pytest.raises(UsageError, match=why):
        CudaBackend(block_size, heads(*shape), library, kv_dtype=torch.int8)
