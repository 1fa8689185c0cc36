"""What lies between layers' attention in one call, against the same operations one by one."""

import pytest
import torch
from builders import random_weights, tiny_config

from batchllm.models.config import ModelConfig
from batchllm.models.native_operations import NativeOperations
from batchllm.models.registry import make_model
from batchllm.native.kernels import load_kernels, usable_targets

TARGETS = [target for target in usable_targets() if load_kernels(target)]
PLAIN = tiny_config(num_hidden_layers=4)
BIASED = PLAIN | {"attention_bias": True, "mlp_bias": True}
ODD = PLAIN | {"intermediate_size": 94}  # in int8 not the kernels' products


class OneByOne(NativeOperations):
    """The same, without blocks."""

    def pack_blocks(self, layers, eps):
        return None


def attend(layer, qkv):
    """Something that depends on the layer; in place, as the kernels rotate."""
    qkv.mul_(1 + layer / 8)
    return qkv[:, :4].flatten(1).contiguous()


def make(kind, config, target, dtype, quantization):
    model = make_model(
        ModelConfig.from_hugging_face(config), dtype, kind(load_kernels(target), tiles=False)
    )
    model.load((n, torch.from_numpy(w).to(dtype)) for n, w in random_weights(config).items())
    model.pack(quantization)
    return model


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
            model = make(kind, config, target, dtype, quantization)
            results.append([model.forward(t, attend, rows[: len(t)]) for t in (tokens, tokens[:1])])
    assert results[0][0].isfinite().all() and results[0][0].std() > 0.01
    for fused, plain in zip(*results, strict=True):
        assert torch.equal(fused, plain)


@pytest.mark.parametrize("target", TARGETS)
def test_products_that_are_not_the_kernels_have_no_blocks(target):
    passes = []

    class Watched(NativeOperations):
        def pack_blocks(self, layers, eps):
            blocks = super().pack_blocks(layers, eps)
            passes.append(blocks)
            return blocks

    make(Watched, PLAIN, target, torch.float32, "int8")
    make(Watched, ODD, target, torch.float32, "int8")
    assert passes[0] is not None and passes[1] is None


def test_two_passes_at_once_do_not_meet():
    if not TARGETS:
        pytest.skip("no kernels were compiled")
    tokens, rows = torch.arange(12), torch.arange(12)
    with torch.inference_mode():
        model = make(NativeOperations, PLAIN, TARGETS[0], torch.float32, None)
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
