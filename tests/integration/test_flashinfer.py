"""The `flashinfer` backend with its library replaced by a plain reading of the documentation."""

import sys
from math import inf
from types import SimpleNamespace

import flashinfer_reading
import numpy as np
import pytest
import torch
from attention_checks import check, deep_tree, poisoned_rows
from attention_trees import decode_trees, items_of, step_of, trees
from flashinfer_checks import Caches
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm import flashinfer_library
from batchllm.attention.backend import GraphBackend, Heads, make_backend
from batchllm.attention.flashinfer import FlashInferBackend, make_flat
from batchllm.errors import UsageError
from batchllm.flashinfer_library import load_flashinfer, make_max_fast
from batchllm.models.rope import Rotation

# kv heads, query heads of each, head_dim
SHAPES = [(1, 1, 64), (2, 3, 64), (3, 2, 64), (1, 5, 128)]
FOLDS = (0, 25, inf)  # every level a call, some folded, none


@pytest.fixture(autouse=True)
def one_thread():
    """For tensors as small as these a second one is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(block_size, shape, fold_below, *, library=flashinfer_reading, dtype=torch.float32):
    kv_heads, group, head_dim = shape
    heads = Heads(group * kv_heads, kv_heads, head_dim)
    return FlashInferBackend(block_size, heads, library, fold_below=fold_below, dtype=dtype)


@given(st.data(), st.sampled_from([1, 4, 16]), st.sampled_from(SHAPES))
@settings(max_examples=200)
def test_equals_reference_on_random_trees(data, block_size, shape):
    step = step_of(data.draw(trees(block_size)), block_size)
    caches = Caches(step, block_size, *shape)
    for fold_below in FOLDS:
        caches.check(make(block_size, shape, fold_below))


@given(
    st.data(),
    st.sampled_from([1, 4, 16]),
    st.sampled_from(SHAPES),
    st.integers(1, 8),
    st.sampled_from(FOLDS),
)
@settings(max_examples=60)
def test_a_recorded_plan_equals_reference_step_after_step(
    data, block_size, shape, num_tokens, fold_below
):
    backend = make(block_size, shape, fold_below)
    rotation = Rotation(*torch.zeros(2, 9, shape[2] // 2))
    graph_plan = backend.graph_plan(9, rotation, None)
    for count in (num_tokens, 9 - num_tokens, num_tokens, num_tokens):
        step = step_of(data.draw(decode_trees(block_size, count)), block_size)
        caches = Caches(step, block_size, *shape)
        rotation.cos[:count], rotation.sin[:count] = caches.rotation.cos, caches.rotation.sin
        assert graph_plan.update(step)
        caches.check_plan(graph_plan)


@pytest.mark.parametrize("fold_below", FOLDS)
def test_nans_stay_with_the_rows_that_see_them(fold_below):
    done = check(
        deep_tree()[::5] + poisoned_rows()[::4],
        make(8, (2, 3, 64), fold_below, dtype=torch.bfloat16),
        block_size=8,
        budget=64,
        head_dim=64,
        dtype=torch.bfloat16,
        tolerance=3e-2,
    )
    assert done.poisoned > 15


def decodes(count, shared, own=1):
    """Decodes with some tokens of their own each, below one shared segment."""
    each = [(i, i + 1, own, True, shared) for i in range(count)]
    return step_of(items_of([*each, (0, count, shared, False, 0)], 8), 8)


class Counting(SimpleNamespace):
    """The reading, which counts its merges and keeps its wrappers."""

    def __init__(self):
        super().__init__(**vars(flashinfer_reading))
        self.merges, self.made = 0, []
        self.merge_state_in_place = self._merge
        for name in ("BatchPrefillWithPagedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper"):
            setattr(self, name, self._kept(getattr(flashinfer_reading, name)))

    def _kept(self, cls):
        def make(*args, **options):
            self.made.append(cls(*args, **options))
            return self.made[-1]

        return make

    def _merge(self, *args):
        self.merges += 1
        flashinfer_reading.merge_state_in_place(*args)

    def counts(self):
        kinds = [type(wrapper).__name__[5:11] for wrapper in self.made]
        return sorted(zip(kinds, [wrapper.calls for wrapper in self.made], strict=True))


def test_a_step_of_decodes_takes_two_attentions_and_a_merge_a_layer():
    library = Counting()
    backend = make(8, (1, 4, 64), 0, library=library)
    for steps in (1, 2):
        Caches(decodes(4, 40), 8, 1, 4, 64).check(backend, layers=3)
        assert library.counts() == [("Decode", 3 * steps), ("Prefil", 3 * steps)]
        assert library.merges == 3 * steps


def test_decodes_beside_a_chunk_are_a_call_of_their_own():
    library = Counting()
    ranges = [(0, 1, 3, True, 0), (1, 6, 9, True, 0), (6, 7, 4, True, 0)]
    Caches(step_of(items_of(ranges, 8), 8), 8, 1, 4, 64).check(
        make(8, (1, 4, 64), 0, library=library)
    )
    assert library.counts() == [("Decode", 1), ("Prefil", 1)] and library.merges == 0


def test_flat_is_one_call():
    library = Counting()
    Caches(decodes(4, 40), 8, 1, 4, 64).check(make(8, (1, 4, 64), inf, library=library))
    assert library.counts() == [("Decode", 1)] and library.merges == 0


def test_a_recording_is_left_to_others_where_it_does_not_fit():
    plan = make(8, (1, 4, 64), 0).graph_plan(100, Rotation(*torch.zeros(2, 100, 32)), None)
    assert plan.update(decodes(4, 70)) and not plan.update(decodes(4, 40, own=300_000))
    assert not plan.update(step_of(items_of([(0, 4, 9, True, 0)], 8), 8))  # a chunk
    assert plan.update(decodes(100, 40))
    alone = [(i, i + 1, 1, True, 8) for i in range(100)]
    pairs = [(i, i + 2, 8, False, 0) for i in range(0, 100, 2)]
    assert plan.update(step_of(items_of([*alone, *pairs], 8), 8))  # 50 entries
    pairs = [(i, i + 2, 8, False, 0) for i in range(0, 99, 3)]
    assert not plan.update(step_of(items_of([*alone, *pairs], 8), 8))  # 33, and gaps


def test_a_recording_is_left_to_others_where_flashinfer_has_no_room():
    rotation = Rotation(*torch.zeros(2, 2000, 64))
    plan = make(16, (8, 4, 128), 0).graph_plan(2000, rotation, None)
    assert plan.update(decodes(900, 40)) and not plan.update(decodes(1500, 40))


def test_arrays_go_to_the_device_by_put_and_what_is_put_may_come_later():
    step, put = decodes(4, 40), []
    caches = Caches(step, 8, 1, 4, 64)

    def later(array):
        put.append((torch.zeros(array.shape, dtype=torch.from_numpy(array).dtype), array.copy()))
        return put[-1][0]

    true = [half.clone() for half in (caches.rotation.cos, caches.rotation.sin)]
    caches.rotation.cos.zero_(), caches.rotation.sin.zero_()
    plan = make(8, (1, 4, 64), 0).plan(step, caches.rotation, later)
    for tensor, array in put:
        tensor.copy_(torch.from_numpy(array))
    caches.rotation.cos.copy_(true[0]), caches.rotation.sin.copy_(true[1])
    caches.check_plan(plan)
    assert len(put) == 3  # slots, and the pages of two calls


def test_it_can_be_recorded():
    assert isinstance(make(8, (1, 4, 64), 0), GraphBackend)


def test_head_dim_must_be_one_of_flashinfers():
    with pytest.raises(UsageError, match="head_dim of 64, 128, 256; it is 80"):
        make(16, (1, 4, 80), 0)


def test_another_dtype_than_planned_for_is_refused():
    caches = Caches(decodes(4, 40), 8, 1, 4, 64)
    with pytest.raises(UsageError, match=r"bfloat16; the model is .*float32"):
        caches.check(make(8, (1, 4, 64), 0, dtype=torch.bfloat16))


def test_kv_of_eight_bits_is_refused():
    with pytest.raises(UsageError, match=r"keep KV in bfloat16, not .*int8"):
        make_flat(16, Heads(4, 1, 64), torch.int8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["flashinfer", "flashinfer-flat"])
def test_without_a_gpu_the_message_says_so(name):
    with pytest.raises(UsageError, match="CUDA device"):
        make_backend(name, 16, 64, heads=Heads(4, 1, 64), device="cuda")


def test_what_is_missing_or_old_is_said_with_the_way_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(UsageError, match=r"pip install 'batchllm\[gpu\]'"):
        load_flashinfer()
    old = SimpleNamespace(__version__="0.5.3")
    monkeypatch.setattr(flashinfer_library, "import_module", lambda name: old)
    with pytest.raises(UsageError, match=r"0\.5\.3 is installed; 0\.6 or later"):
        make_flat(16, Heads(4, 1, 64), None)


def test_a_maximum_is_found_in_one_call_and_else_is_pythons_own():
    module = SimpleNamespace()
    make_max_fast(module)
    lengths = torch.tensor([3, 9, 4], dtype=torch.int32)
    assert module.max(lengths).item() == 9 and module.max(lengths).dim() == 0
    assert module.max(2, 5) == 5 and module.max([1, 7]) == 7 and module.max([], default=0) == 0


def test_the_reading_sees_calls_that_the_documentation_forbids():
    wrapper = flashinfer_reading.BatchPrefillWithPagedKVCacheWrapper(torch.empty(1).byte())

    def plan(qo=(0, 2), kv=(0, 2), pages=(3, 5), last=(4,), size=4, dtype=np.int32):
        arrays = [torch.from_numpy(np.array(a, dtype=dtype)) for a in (qo, kv, pages, last)]
        wrapper.plan(*arrays, 2, 1, 64, size, q_data_type=torch.float32)

    plan()
    for wrong in (
        {"last": (5,)},
        {"last": (0,)},
        {"qo": (1, 2)},
        {"kv": (0, 1)},
        {"dtype": np.int64},
        {"qo": (0, 2, 2), "kv": (0, 2, 2), "last": (4, 0)},
        {"qo": (0, 1, 2), "kv": (0, 2, 2), "last": (4, 1)},
    ):
        with pytest.raises(AssertionError):
            plan(**wrong)
