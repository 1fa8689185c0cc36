"""The `cuda` kernel on a GPU against the reference: what the emulation cannot tell."""

import pytest
import torch
from attention_checks import TREES, check, check_tree, deep_tree, long_rows, poisoned_rows
from attention_trees import trees
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchllm.attention.backend import Heads
from batchllm.attention.cuda import CudaBackend
from batchllm.attention.cuda_library import load_cuda_library
from batchllm.attention.cuda_plan import UnitCosts
from batchllm.attention.timing import Sizes, gpu_seconds, measure_share
from batchllm.errors import UsageError

pytestmark = pytest.mark.gpu

SHAPES = [(1, 1, 64), (2, 3, 64), (3, 4, 96), (1, 8, 128), (2, 5, 64), (1, 17, 64), (4, 7, 128)]
COSTS = [
    UnitCosts(),
    UnitCosts(partial_row=0.0, unit=0.0, least_keys=1),
    UnitCosts(partial_row=1e9),
    UnitCosts(partial_row=0.0, unit=0.0, least_keys=70),
]
KV_DTYPES = [None, torch.float8_e4m3fn, torch.int8]


@pytest.fixture(scope="module")
def library():
    try:
        return load_cuda_library()
    except UsageError as error:
        pytest.skip(str(error))


def sizes_of(library, shape, block_size, costs, kv_dtype):
    """The backend, and what `check` and `check_tree` want to know."""
    kv_heads, group, head_dim = shape
    backend = CudaBackend(
        block_size,
        Heads(kv_heads * group, kv_heads, head_dim),
        library,
        costs=costs,
        kv_dtype=kv_dtype or torch.bfloat16,
    )
    sizes = {
        "block_size": block_size,
        "kv_heads": kv_heads,
        "group": group,
        "head_dim": head_dim,
        "dtype": torch.bfloat16,
        "tolerance": 6e-2 if kv_dtype == torch.int8 else 3e-2,
        "device": "cuda",
        "kv_dtype": kv_dtype,
    }
    return backend, sizes


@given(
    st.sampled_from(SHAPES),
    st.sampled_from(COSTS),
    st.sampled_from(KV_DTYPES),
    st.sampled_from([4, 16, 64]).flatmap(lambda size: st.tuples(st.just(size), trees(size))),
)
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
def test_equals_reference_on_random_trees(library, shape, costs, kv_dtype, items):
    block_size, items = items
    backend, sizes = sizes_of(library, shape, block_size, costs, kv_dtype)
    check_tree(items, backend, **sizes)


@given(TREES, st.integers(1, 50), st.sampled_from(SHAPES), st.sampled_from(COSTS))
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
def test_equals_reference_as_tables_are_answered(library, rows, budget, shape, costs):
    backend, sizes = sizes_of(library, shape, 16, costs, None)
    check(rows, backend, budget=budget, **sizes)


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("rows", [deep_tree(), long_rows()], ids=["deep", "long"])
def test_equals_reference_on_long_contexts(library, rows, kv_dtype, costs):
    backend, sizes = sizes_of(library, (2, 4, 128), 16, costs, kv_dtype)
    assert check(rows, backend, budget=200, **sizes).steps > 5


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_nans_stay_with_the_rows_that_see_them(library, kv_dtype):
    backend, sizes = sizes_of(library, (1, 4, 64), 16, COSTS[1], kv_dtype)
    assert check(poisoned_rows(), backend, budget=60, **sizes).poisoned > 20


def test_a_share_of_the_device_reads_slower_than_all_of_it_and_is_as_right(library):
    """What is found is printed: it is what the cost model goes by."""
    heads = Heads(32, 8, 128)
    backend = CudaBackend(16, heads, library)
    found = measure_share(
        backend, Sizes(heads, 16, torch.bfloat16), torch.device("cuda"), gpu_seconds
    )
    print(f"share and speed beside products: {found}")
    assert found is not None and 0 < found[0] < 1 and 0.1 < found[1] <= 1
    backend, sizes = sizes_of(library, (2, 4, 128), 16, COSTS[0], None)
    assert check(deep_tree(), backend.on_share(found[0]), budget=200, **sizes).steps > 5
