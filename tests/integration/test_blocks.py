"""What lies between layers' attention in one call, against the same operations one by one."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_trees import items_of, step_of
from block_models import OneByOne, attend, make
from builders import tiny_config

from batchllm.attention.cascade import TorchBackend
from batchllm.attention.native import NativeBackend
from batchllm.models.native_operations import NativeOperations
from batchllm.models.operations import AttentionCalls
from batchllm.native.kernels import load_kernels, usable_targets
from batchllm.runner.forward import PlannedAttention
from batchllm.runner.kv_cache import KVCache

TARGETS = [target for target in usable_targets() if load_kernels(target)]
PLAIN = tiny_config(num_hidden_layers=4)
BIASED = PLAIN | {"attention_bias": True, "mlp_bias": True}
ODD = PLAIN | {"intermediate_size": 94}  # in int8 not the kernels' products


@pytest.mark.parametrize("config", [PLAIN, BIASED, ODD], ids=["plain", "biased", "odd"])
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_blocks_equal_their_operations(target, dtype, quantization, config):
    tokens = torch.arange(70) * 3 % 250
    rows = torch.tensor([0, 5, 69])
    results = []
    with torch.inference_mode():
        for kind in (NativeOperations, OneByOne):
            model = make(kind, config, load_kernels(target), dtype, quantization)
            results.append([model.forward(t, attend, rows[: len(t)]) for t in (tokens, tokens[:1])])
    assert results[0][0].isfinite().all() and results[0][0].std() > 0.01
    for fused, plain in zip(*results, strict=True):
        assert torch.equal(fused, plain)


def packed_blocks(config, target):
    """What `pack_blocks` made for a model in int8."""
    made = []

    class Watched(NativeOperations):
        def pack_blocks(self, layers, eps):
            made.append(super().pack_blocks(layers, eps))
            return made[0]

    make(Watched, config, load_kernels(target), torch.float32, "int8")
    return made[0]


@pytest.mark.parametrize("target", TARGETS)
def test_products_that_are_not_the_kernels_have_no_blocks(target):
    assert packed_blocks(PLAIN, target) is not None
    assert packed_blocks(ODD, target) is None


def test_two_passes_at_once_do_not_meet():
    if not TARGETS:
        pytest.skip("no kernels were compiled")
    tokens, rows = torch.arange(12), torch.arange(12)
    with torch.inference_mode():
        model = make(NativeOperations, PLAIN, load_kernels(TARGETS[0]), torch.float32, None)
        alone = [model.forward(part, attend, rows[:6]) for part in (tokens[:6], tokens[6:])]
        passes = [model.layers(part, rows[:6]) for part in (tokens[:6], tokens[6:])]
        asked = [next(layers) for layers in passes]
        together = []
        for _ in range(PLAIN["num_hidden_layers"]):
            for i, layers in enumerate(passes):
                try:
                    asked[i] = layers.send(attend(*asked[i]))
                except StopIteration as end:
                    together.append(end.value)
    assert all(map(torch.equal, alone, together))


def run_step(model, make_backend, one_call, kv_dtype=None, rows=(22, 27)):
    """A step of two rows under a prefix, all in one step; what was computed, and the cache."""
    ranges = [(0, 20, 20, True, 0), (20, 23, 3, True, 20), (23, 28, 5, True, 20)]
    step = step_of(items_of([*ranges, (20, 28, 20, False, 0)], 16), 16)
    token_ids = np.arange(28, dtype=np.int32) * 7 % 250
    step = replace(step, token_ids=token_ids, sample_rows=np.array(rows))
    config = model.config
    cache = KVCache(
        num_layers=config.num_layers,
        num_blocks=8,
        block_size=16,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=kv_dtype or model.dtype,
    )
    plan = make_backend(16, config.head_dim).plan(
        step, model.rotary(torch.from_numpy(step.positions))
    )
    attend = PlannedAttention(plan, cache)
    hidden = model.forward(
        torch.from_numpy(step.token_ids),
        attend if one_call else attend.__call__,
        torch.tensor(rows),
    )
    return hidden, cache.keys, cache.values


@pytest.mark.parametrize("rows", [(22, 27), range(28)], ids=["some", "all"])
@pytest.mark.parametrize("num_layers", [1, 2, 4])
@pytest.mark.parametrize(
    "quantization, kv_dtype", [(None, None), ("int8", None), ("int8", torch.int8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", TARGETS)
def test_all_layers_in_one_call_equal_one_by_one(
    target, dtype, quantization, kv_dtype, num_layers, rows
):
    kernels, calls = load_kernels(target), []

    def backend(block_size, head_dim):
        made = NativeBackend(block_size, head_dim, kernels)
        plan = made.plan

        def watched(*arguments):
            planned = plan(*arguments)
            original = planned.calls
            planned.calls = lambda *a: calls.append(len(a[0])) or original(*a)
            return planned

        made.plan = watched
        return made

    with torch.inference_mode():
        config = tiny_config(num_hidden_layers=num_layers)
        model = make(NativeOperations, config, load_kernels(target), dtype, quantization)
        together, apart = (run_step(model, backend, way, kv_dtype, rows) for way in (True, False))
    of_torch = target == "portable" and quantization is None  # products, which kernels cannot call
    in_one = num_layers - (len(rows) < 28)
    assert calls == ([] if of_torch or in_one == 0 else [in_one])
    assert together[0].isfinite().all() and together[0].std() > 0.01
    assert all(map(torch.equal, together, apart))


@pytest.mark.skipif(len(TARGETS) < 2, reason="one kind of kernels at most was compiled")
def test_other_kernels_attention_is_not_called():
    class Others:
        def calls(self, qkv):
            return AttentionCalls(load_kernels(TARGETS[1]), 0, 0, None)

    with torch.inference_mode():
        blocks = packed_blocks(PLAIN, TARGETS[0])
        begun, qkv = blocks.start(torch.zeros(3, 64)), torch.zeros(3, 8, 16)
        assert begun.run_all(qkv, Others()) is None and not begun.run_through(qkv, Others())


def test_another_backends_attention_is_called_layer_by_layer():
    if not TARGETS:
        pytest.skip("no kernels were compiled")
    with torch.inference_mode():
        model = make(NativeOperations, PLAIN, load_kernels(TARGETS[0]), torch.float32, None)
        native, other = (run_step(model, kind, True)[0] for kind in (NativeBackend, TorchBackend))
    torch.testing.assert_close(native, other, atol=1e-4, rtol=1e-4)
