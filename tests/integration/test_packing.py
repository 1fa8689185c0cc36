"""Weights packed by the compiled kernels, against their panels laid out in torch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.models.linear import round_to_int8
from batchllm.models.native_linear import NativeProducts
from batchllm.native.kernels import load_kernels, usable_targets

TARGETS = [target for target in usable_targets() if load_kernels(target)]
GATED = [target for target in TARGETS if load_kernels(target).gated_width]
DTYPES = [torch.float32, torch.bfloat16]
# Outputs and inputs around the sizes of panels and of lines of them.
SHAPES = st.tuples(st.integers(1, 130), st.integers(1, 50).map(lambda n: 4 * n))


def packed(target, weight, bias=None, *, is_int8):
    """Panels, scales, starts and bias of a product that is the kernels' own."""
    products = NativeProducts(load_kernels(target), tiles=False, always=True)
    make = products.pack_int8 if is_int8 else products.pack
    return make(weight, bias).packed._tensors


def noise(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (weight * 10 ** torch.linspace(-3, 3, shape[0])[:, None]).to(dtype)


def laid_out(weight, target):
    """[panel][word][output of the panel], zeros behind the last output."""
    width = load_kernels(target).panel_width
    words = weight.contiguous().view(torch.int32)
    words = F.pad(words, (0, 0, 0, -len(words) % width))
    return words.view(-1, width, words.shape[1]).transpose(1, 2)


def taken_apart(panels, shape, target):
    """The int8 weight [outputs, inputs] that lies in panels, whose rest must be zeros."""
    kernels, (outputs, inputs) = load_kernels(target), shape
    words = panels.view(torch.int8).view(-1, inputs // 4, kernels.panel_width, 4)
    rows = words.transpose(1, 2).reshape(-1, inputs)
    assert not rows[outputs:].any()
    if kernels.rounded_bytes == 2:
        rows = rows.view(-1, inputs // 4, 4)[:, :, [0, 2, 1, 3]].reshape(-1, inputs)
    return rows[:outputs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
@given(SHAPES)
@settings(max_examples=40)
def test_panels_are_the_weight(target, dtype, shape):
    weight = noise(shape, dtype)
    panels, scales, starts, _ = packed(target, weight, is_int8=False)
    assert scales is None and starts is None
    expected = laid_out(weight, target).reshape(-1)
    assert torch.equal(panels.view(torch.int32), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
@given(SHAPES)
@settings(max_examples=40)
def test_int8_weights_are_rounded_as_torch_rounds_them(target, dtype, shape):
    weight, outputs = noise(shape, dtype), shape[0]
    weight[-1] = 0
    panels, scales, starts, _ = packed(target, weight, is_int8=True)
    rounded = taken_apart(panels, shape, target)
    expected, expected_scales = round_to_int8(weight)
    assert torch.equal(rounded, expected) and torch.equal(scales[:outputs], expected_scales)
    assert starts[:outputs].tolist() == (-128 * rounded.sum(dim=1)).tolist()
    assert not scales[outputs:].any() and not starts[outputs:].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("target", TARGETS)
def test_int8_weights_that_are_no_numbers_are_their_outputs_alone(target, bad):
    weight = noise((40, 64), torch.bfloat16)
    sound = packed(target, weight, is_int8=True)[1].clone()
    weight[7, 33] = bad
    scales = packed(target, weight, is_int8=True)[1]
    assert torch.isnan(scales).nonzero().flatten().tolist() == [7]
    scales[7] = sound[7]
    assert torch.equal(scales, sound)


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("target", GATED)
def test_gates_and_ups_take_turns_in_a_panel(target, is_int8):
    kernels = load_kernels(target)
    width, inputs = kernels.gated_width, 64
    weight = noise((6 * width, inputs), torch.bfloat16)
    bias = torch.arange(6 * width).bfloat16()
    order = torch.arange(6 * width).view(2, 3, width).transpose(0, 1).flatten()
    products = NativeProducts(kernels, tiles=False)
    gated = products.pack_gated(weight, bias, "int8" if is_int8 else None).packed
    expected = packed(target, weight[order], bias[order], is_int8=is_int8)
    assert gated.gated and gated.outputs == 3 * width
    assert all(map(torch.equal, present(gated._tensors), present(expected)))


def present(tensors):
    return [tensor for tensor in tensors if tensor is not None]


def test_a_weight_that_is_a_view_is_packed_as_it_reads():
    weight = noise((50, 40), torch.bfloat16)
    views = [torch.stack([weight, weight], dim=2)[:, :, 0], F.pad(weight, (3, 5, 2, 2))[2:52, 3:43]]
    expected = packed(TARGETS[0], weight, is_int8=True)
    for view in views:
        got = packed(TARGETS[0], view, is_int8=True)
        assert all(map(torch.equal, present(got), present(expected)))
