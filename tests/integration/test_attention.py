"""The fast backends against the reference, on batches that a real scheduler made."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from attention_checks import (
    TREES,
    check,
    check_values_of_all_sizes,
    deep_tree,
    long_rows,
    poisoned_rows,
    tolerance_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.attention.backend import backend_names, make_backend
from batchllm.attention.cascade import TorchBackend, merge_state
from batchllm.attention.native import NativeBackend, Tiles
from batchllm.errors import UsageError
from batchllm.native.kernels import load_kernels, usable_targets
from batchllm.runner.model_input import AttentionItems

KV_DTYPES = [None, torch.int8]
NATIVE = [target for target in usable_targets() if load_kernels(target)]


@given(TREES, st.integers(1, 50), st.sampled_from([(1, 1, 16), (2, 3, 8), (3, 2, 4), (5, 1, 2)]))
@settings(max_examples=60)
def test_torch_backend_equals_reference_on_random_trees(rows, budget, shape):
    kv_heads, group, head_dim = shape
    done = check(rows, "torch", budget=budget, kv_heads=kv_heads, group=group, head_dim=head_dim)
    assert done.steps > 0


@pytest.mark.parametrize("target", NATIVE)
@given(
    TREES,
    st.integers(1, 50),
    st.sampled_from([16, 32]),
    st.sampled_from([(1, 1, 16), (2, 3, 64), (3, 2, 80), (1, 8, 128), (5, 1, 48)]),
    st.sampled_from(KV_DTYPES),
)
@settings(max_examples=60)
def test_native_backend_equals_reference_on_random_trees(
    target, rows, budget, block_size, shape, kv_dtype
):
    kv_heads, group, head_dim = shape
    done = check(
        rows,
        NativeBackend(block_size, head_dim, load_kernels(target)),
        block_size=block_size,
        budget=budget,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        tolerance=tolerance_of(torch.float32, kv_dtype),
        kv_dtype=kv_dtype,
    )
    assert done.steps > 0


def test_long_shared_prefixes_are_read_once_for_all():
    assert check(deep_tree(), "torch", budget=64).steps > 5


@pytest.mark.parametrize("rows", [deep_tree(), long_rows()], ids=["deep", "long"])
@pytest.mark.parametrize("block_size", [16, 512])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", NATIVE)
def test_native_backend_equals_reference_on_long_contexts(
    target, dtype, kv_dtype, block_size, rows
):
    done = check(
        rows,
        NativeBackend(block_size, 64, load_kernels(target)),
        block_size=block_size,
        budget=200,
        head_dim=64,
        dtype=dtype,
        tolerance=tolerance_of(dtype, kv_dtype),
        kv_dtype=kv_dtype,
    )
    assert done.steps > 5


def test_bfloat16_stays_within_its_rounding():
    done = check(deep_tree(), "torch", budget=64, dtype=torch.bfloat16, tolerance=3e-2)
    assert done.steps > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend, kv_dtype", [("torch", None), *product(NATIVE, KV_DTYPES)])
def test_nans_stay_with_the_rows_that_see_them(backend, kv_dtype, dtype):
    if backend != "torch":
        backend = NativeBackend(16, 64, load_kernels(backend))
    done = check(
        poisoned_rows(),
        backend,
        block_size=16,
        budget=64,
        head_dim=64,
        dtype=dtype,
        tolerance=tolerance_of(dtype, kv_dtype),
        kv_dtype=kv_dtype,
    )
    assert done.poisoned > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", NATIVE)
def test_values_of_all_sizes_in_int8(target, dtype):
    check_values_of_all_sizes(NativeBackend(16, 64, load_kernels(target)), dtype)


def test_merge_state_equals_one_softmax():
    torch.manual_seed(0)
    query, keys = torch.randn(5, 2, 3, 4), torch.randn(9, 2, 4)
    values = torch.randn(9, 2, 4)

    def attend(begin, end):
        scores = torch.einsum("nhgd,lhd->nhgl", query, keys[begin:end])
        weights = scores.softmax(-1)
        return torch.einsum("nhgl,lhd->nhgd", weights, values[begin:end]), scores.logsumexp(-1)

    (out, lse), second, whole = attend(0, 4), attend(4, 9), attend(0, 9)
    merge_state(out, lse, *second)
    torch.testing.assert_close(out, whole[0])
    torch.testing.assert_close(lse, whole[1])


def test_unknown_backend_names_the_known():
    with pytest.raises(UsageError, match="reference"):
        make_backend("turbo", 16, 64)
    assert {"native", "torch"} <= set(backend_names())


def test_auto_takes_the_kernels_where_they_fit_and_torch_elsewhere():
    assert isinstance(make_backend("auto", 16, 64), NativeBackend if NATIVE else TorchBackend)
    assert isinstance(make_backend("auto", 4, 64), TorchBackend)


@pytest.mark.parametrize("block_size, head_dim", [(8, 64), (48, 64), (16, 40)])
def test_native_backend_refuses_what_the_kernel_cannot_do(block_size, head_dim):
    with pytest.raises(UsageError, match=r"block_size|head_dim|compiled"):
        make_backend("native", block_size, head_dim)


def items_of(ranges, own):
    """Attention items over queries [begin, end), all of `kv_len` tokens."""
    begin, end, kv_len = (np.array(column) for column in zip(*ranges, strict=True))
    none = np.zeros(0, dtype=np.int64)
    start = np.arange(len(begin))[::-1].copy()  # the last one comes first
    return AttentionItems(begin, end, start, kv_len, np.array(own), none, none)


@given(st.data())
def test_tiles_partition_the_queries_and_read_what_their_queries_do(data):
    num_tokens = data.draw(st.integers(1, 40))
    size = data.draw(st.integers(1, 12))
    ends = st.tuples(st.integers(0, num_tokens - 1), st.integers(1, num_tokens)).map(
        lambda pair: (min(pair), max(pair[0] + 1, pair[1]))
    )
    ranges = data.draw(st.lists(st.tuples(ends, st.integers(1, 50)), min_size=1, max_size=8))
    ranges = [(begin, end, kv_len) for (begin, end), kv_len in ranges]
    items = items_of(ranges, [False] * len(ranges))
    tiles = Tiles.of(items, num_tokens, size)
    begins = tiles.begin.tolist()
    assert begins[0] == 0 and begins[-1] == num_tokens
    assert all(0 < b - a <= size for a, b in pairwise(begins))
    assert sorted(tiles.order.tolist()) == list(range(len(begins) - 1))
    for tile, (first, last) in enumerate(pairwise(begins)):
        read = tiles.items[tiles.offsets[tile] : tiles.offsets[tile + 1]].tolist()
        overlaps = [i for i, (b, e, _) in enumerate(ranges) if b < last and e > first]
        assert read == sorted(overlaps, key=lambda i: items.kv_start[i])
    wanted = sorted(data.draw(st.sets(st.integers(0, num_tokens - 1))))
    some = [i for i, (a, b) in enumerate(pairwise(begins)) if any(a <= q < b for q in wanted)]
    found = tiles.with_any(np.array(wanted, dtype=np.int64))
    assert found.tolist() == [tile for tile in tiles.order.tolist() if tile in some]


def test_tiles_are_cut_where_shared_segments_end():
    groups = [(0, 16, 1000), (16, 30, 1000), (30, 46, 1000)]
    tiles = Tiles.of(items_of(groups, [False] * 3), 46, 24)
    assert tiles.begin.tolist() == [0, 16, 30, 46]
