"""The `cuda` kernel's own lines, run by the emulation, against the reference."""

import flashinfer_reading
import numpy as np
import pytest
import torch
from attention_checks import (
    TREES,
    check,
    check_tree,
    deep_tree,
    long_rows,
    poisoned_rows,
    step_of,
    tolerance_of,
)
from attention_trees import items_of, trees
from device_steps import BLOCK_SIZE as STEP_BLOCK_SIZE
from device_steps import MAX_NUM_SEQS, NUM_BLOCKS, cache_of, requests, run_all, tiny_model
from emulated import compile_emulated
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.attention.backend import Heads, make_backend
from batchllm.attention.cuda import CudaBackend
from batchllm.attention.cuda_graph import CudaGraphPlan
from batchllm.attention.cuda_library import CudaLibrary
from batchllm.attention.cuda_plan import UnitCosts
from batchllm.attention.flashinfer import FlashInferBackend
from batchllm.attention.mixed import MixedBackend, Part
from batchllm.attention.sample_items import grouped
from batchllm.attention.step_costs import StepCosts
from batchllm.attention.timing import with_measured_costs
from batchllm.errors import UsageError
from batchllm.models.device_operations import DeviceOperations
from batchllm.models.rope import Rotation
from batchllm.runner import decode_graphs
from batchllm.runner.device import CpuDevice
from batchllm.runner.device_runner import DeviceRunner
from batchllm.runner.staging import FixedStager

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
        tolerance=tolerance_of(torch.bfloat16, kv_dtype),
        kv_dtype=kv_dtype,
    )


KV_DTYPES = [None, torch.float8_e4m3fn, torch.int8]


@given(TREES, st.integers(1, 50), st.sampled_from(SHAPES), st.sampled_from(COSTS))
@settings(max_examples=8)
def test_equals_reference_as_tables_are_answered(library, rows, budget, shape, costs):
    hold(library, rows, shape, budget=budget, costs=costs)


def random_trees(count):
    def decorate(test):
        sizes = {"shape": st.sampled_from(SHAPES), "costs": st.sampled_from(COSTS)}
        sizes["kv_dtype"] = st.sampled_from(KV_DTYPES)
        sizes["items"] = st.sampled_from([4, 16, 64]).flatmap(
            lambda size: st.tuples(st.just(size), trees(size, most_tokens=12))
        )
        return settings(max_examples=count)(given(**sizes)(test))

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
        tolerance=tolerance_of(torch.bfloat16, kv_dtype),
        device="cpu",
        kv_dtype=kv_dtype,
    )


@random_trees(10)
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


class FixedPlaces:
    """Every step by one plan, as a recorded step would be."""

    name, granularity = "fixed", 1

    def __init__(self, backend, most):
        self.stager = FixedStager(CpuDevice())
        half = backend.heads.head_dim // 2
        self.rotation = Rotation(torch.zeros(most, half), torch.zeros(most, half))
        self.backend, self.updates, self.refused = backend, 0, 0
        self.graph = backend.graph_plan(most, self.rotation, self.stager.reserve)
        self.addresses = self.places()

    def places(self):
        return [place.tensor.data_ptr() for place in self.graph._places.values()]

    def plan(self, step, rotation, put):
        count = len(step.token_ids)
        if not (
            step.items.query_end[step.items.own] - step.items.query_begin[step.items.own] == 1
        ).all():
            return self.backend.plan(step, rotation, put)
        if not self.graph.update(step):
            self.refused += 1
            return self.backend.plan(step, rotation, put)
        self.rotation.cos[:count], self.rotation.sin[:count] = rotation.cos, rotation.sin
        self.stager.send()
        self.updates += 1
        assert self.places() == self.addresses
        return self.graph


def test_decodes_of_any_number_from_places_that_never_move(library):
    backend = FixedPlaces(CudaBackend(16, heads(2, 3, 64), library, costs=COSTS[1]), 40)
    check(
        deep_tree()[:30],
        backend,
        block_size=16,
        budget=400,
        kv_heads=2,
        group=3,
        head_dim=64,
        dtype=torch.bfloat16,
        tolerance=3e-2,
    )
    assert backend.updates > 5 and backend.refused == 0


class Repeat:
    """A recorder that runs the call again."""

    def __init__(self):
        self.repeated = 0

    def record(self, call):
        def repeat():
            self.repeated += 1
            call()

        return repeat


def test_a_model_samples_as_with_the_reference(library, monkeypatch):
    """Through the runner, also from places that never move; rounding decides a few tokens."""
    monkeypatch.setattr(decode_graphs, "_RUNS_BEFORE", 1)
    sizes = {"dtype": torch.bfloat16, "head_dim": 64}
    model, recorder, same = tiny_model(DeviceOperations(), **sizes), Repeat(), []
    expected, got = (
        DeviceRunner(
            model,
            cache_of(model, NUM_BLOCKS + 1),
            backend,
            DeviceOperations(),
            CpuDevice(),
            block_size=STEP_BLOCK_SIZE,
            max_num_seqs=MAX_NUM_SEQS,
            recorder=recorder,
        )
        for backend in (
            make_backend("reference", STEP_BLOCK_SIZE, 64),
            CudaBackend(STEP_BLOCK_SIZE, heads(2, 2, 64), library),
        )
    )

    class Pair:
        def execute(self, batch):
            want, output = expected.execute(batch), got.execute(batch)
            same.extend(output.token_ids == want.token_ids)
            return want

    run_all(requests([([i % 7, 1, i % 3] * (1 + i % 3), 4 + i, 0) for i in range(15)]), Pair())
    assert recorder.repeated > 5
    assert sum(same) / len(same) > 0.95


def test_costs_are_measured_with_the_kernel_itself(library, monkeypatch):
    backend = CudaBackend(16, heads(2, 2, 64), library)
    planned_with = UnitCosts(large_key=3.0)
    calls = []

    def clock(call):
        call()
        calls.append(backend.costs)
        return float(len(calls))

    def measure(time_step, **sizes):
        assert sizes.pop("num_blocks") == backend.num_blocks
        assert sizes == {"group": 2, "num_kv_heads": 2, "block_size": 16}
        seconds = time_step(grouped(2, 3, 1, 40, 16), 6, planned_with)
        return UnitCosts(unit=seconds)

    monkeypatch.setattr("batchllm.attention.timing.measure_costs", measure)
    costs = with_measured_costs(backend, torch.device("cpu"), clock)
    assert costs == UnitCosts(unit=3.0)  # the median of five
    assert calls == [planned_with] * 5 and backend.costs == UnitCosts()


def test_two_backends_share_a_cache_and_each_takes_what_it_is_faster_for(library, monkeypatch):
    """Chunks by FlashInfer's calls, read plainly, and decodes by the kernel."""
    shape = kv_heads, group, head_dim = 2, 3, 64
    ours = CudaBackend(4, heads(*shape), library)
    theirs = FlashInferBackend(4, heads(*shape), flashinfer_reading)
    planned = []
    for backend in (ours, theirs):
        plan = backend.plan

        def noted(step, rotation, put, plan=plan, name=backend.name):
            planned.append((name, len(step.token_ids) == len(step.samples)))
            return plan(step, rotation, put)

        monkeypatch.setattr(backend, "plan", noted)
    costs = [StepCosts(np.array(each, float)) for each in ([1, 0, 9, 0, 0, 0], [5, 0, 0, 0, 0, 0])]
    mixed = MixedBackend(ours, costs[0], [Part(theirs, costs[1])])
    assert mixed.name == "cuda (emulated) or flashinfer"
    check(
        deep_tree(),
        mixed,
        block_size=4,
        budget=60,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        tolerance=tolerance_of(torch.bfloat16),
    )
    assert {name for name, is_decodes in planned if is_decodes} == {ours.name}
    assert {name for name, is_decodes in planned if not is_decodes} == {theirs.name}
    assert len(planned) > 10
    rotation, reserve = Rotation(torch.zeros(2, 32), torch.zeros(2, 32)), FixedStager(CpuDevice())
    assert isinstance(mixed.graph_plan(2, rotation, reserve.reserve), CudaGraphPlan)
    assert mixed.on_share(0.4).num_blocks == max(int(ours.num_blocks * 0.4), 1)


def test_a_step_without_room_is_left_to_others(library):
    backend = CudaBackend(4, heads(1, 1, 64), library)
    rotation = Rotation(torch.zeros(2, 32), torch.zeros(2, 32))
    plan = backend.graph_plan(2, rotation, FixedStager(CpuDevice()).reserve)
    fits, too_long = ([(0, 1, length, True, 0)] for length in (500, 3000))
    assert plan.update(step_of(items_of(fits, 4), 4))
    assert not plan.update(step_of(items_of(too_long, 4), 4))


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
