"""FlashInfer on a GPU: the backend against the reference, the rest against torch and definitions.

FlashInfer compiles its kernels when they are first used, for each head_dim anew: minutes.
"""

import functools
import warnings
from math import inf

import numpy as np
import pytest
import torch
from attention_checks import check, deep_tree, long_rows, poisoned_rows
from attention_trees import items_of, step_of, trees
from flashinfer_checks import Caches
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import make_samples

from batchllm.attention.backend import Heads
from batchllm.attention.cuda_library import load_cuda_library
from batchllm.attention.flashinfer import FlashInferBackend
from batchllm.attention.flashinfer_write import Write
from batchllm.attention.mixed import make_mixed
from batchllm.attention.write import rotate_and_write
from batchllm.errors import UsageError
from batchllm.flashinfer_library import load_flashinfer
from batchllm.models.flashinfer_operations import FlashInferOperations
from batchllm.models.operations import TorchOperations
from batchllm.models.rope import Rotation
from batchllm.request import SamplingParams
from batchllm.sampling.flashinfer_draw import FlashInferDraw
from batchllm.sampling.sampler import put_draws, sample_on_device
from batchllm.scheduler.batch import NO_TOKEN

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs
    try:
        library = load_flashinfer()
    except UsageError as error:
        pytest.skip(str(error), allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
BFLOAT16 = 3e-2  # of values of about 2: the product with values and every merge round to 2^-9
FOLDS = (0, 25, inf)  # every level a call, some folded, none
# Three heads to a key are FlashInfer's plain decode kernel, four its tensor cores.
SHAPES = {"64": (2, 3, 64, "auto"), "128": (2, 4, 128, "auto")}


@functools.cache  # each has a workspace of hundreds of megabytes
def backend(block_size, shape, fold_below):
    kv_heads, group, head_dim, kernel = SHAPES[shape]
    heads = Heads(group * kv_heads, kv_heads, head_dim)
    return FlashInferBackend(block_size, heads, library, fold_below=fold_below, kernel=kernel)


def caches_on_gpu(step, shape, block_size, **options):
    kv_heads, group, head_dim, _ = SHAPES[shape]
    to_gpu = {"dtype": torch.bfloat16, "tolerance": BFLOAT16, "device": "cuda"}
    return Caches(step, block_size, kv_heads, group, head_dim, **to_gpu, **options)


@pytest.mark.parametrize("shape", SHAPES)
@given(st.data(), st.sampled_from([4, 16]))
@settings(max_examples=100)
def test_attention_equals_reference_on_random_trees(shape, data, block_size):
    caches = caches_on_gpu(step_of(data.draw(trees(block_size)), block_size), shape, block_size)
    for fold_below in FOLDS:
        caches.check(backend(block_size, shape, fold_below))


@pytest.mark.parametrize("fold_below", FOLDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ["deep", "long", "poisoned"])
def test_attention_equals_reference_step_after_step(rows, shape, fold_below):
    kv_heads, group, head_dim, _ = SHAPES[shape]
    done = check(
        {"deep": deep_tree, "long": long_rows, "poisoned": poisoned_rows}[rows](),
        backend(16, shape, fold_below),
        block_size=16,
        budget=100,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=torch.bfloat16,
        tolerance=BFLOAT16,
        device="cuda",
    )
    assert done.steps > 5 and (done.poisoned > 20 or rows != "poisoned")


@pytest.mark.parametrize("shape", ["128"])
def test_mixed_with_our_kernel_equals_reference_step_after_step(shape):
    try:
        load_cuda_library()
    except UsageError as error:
        pytest.skip(str(error))
    kv_heads, group, head_dim, _ = SHAPES[shape]
    mixed = make_mixed(16, Heads(group * kv_heads, kv_heads, head_dim), None)
    print([part.costs for part in mixed._parts])
    sizes = {"kv_heads": kv_heads, "group": group, "head_dim": head_dim, "device": "cuda"}
    done = check(
        deep_tree(),
        mixed,
        block_size=16,
        budget=100,
        dtype=torch.bfloat16,
        tolerance=BFLOAT16,
        **sizes,
    )
    assert done.steps > 5


@pytest.mark.parametrize("fold_below", FOLDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_tokens", [1, 9, 100])
@torch.inference_mode()
def test_a_recording_equals_reference_step_after_step(num_tokens, shape, fold_below):
    steps = [decodes(num_tokens, 30 + 90 * (i % 3), 5 + 40 * i, apart=2 + i) for i in range(5)]
    each = [caches_on_gpu(step, shape, 16, num_blocks=2000, seed=i) for i, step in enumerate(steps)]
    turn = rotation(num_tokens + 3, SHAPES[shape][2])
    plan = backend(16, shape, fold_below).graph_plan(num_tokens + 3, turn, None)
    qkv, cache = torch.empty_like(each[0].qkv), torch.empty_like(each[0].cache)

    def show(caches):
        assert plan.update(caches.step)
        turn.cos[:num_tokens], turn.sin[:num_tokens] = caches.rotation.cos, caches.rotation.sin
        qkv.copy_(caches.qkv)
        cache.copy_(caches.cache)

    show(each[0])
    each[0].compare(plan.run(qkv, *cache), cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan.run(qkv, *cache)
    for caches in each:
        show(caches)
        graph.replay()
        caches.compare(out, cache)


def decodes(num_decodes, shared, own, *, apart=10**9):
    """Decodes with `own` tokens each below a segment for each run of `apart` of them."""
    alone = [(i, i + 1, own + i % 3, True, shared) for i in range(num_decodes)]
    begins = range(0, num_decodes, apart)
    groups = [(i, min(i + apart, num_decodes), shared, False, 0) for i in begins]
    return step_of(items_of(alone + groups, 16), 16)


def rotation(num_tokens, head_dim):
    angles = torch.randn(num_tokens, head_dim // 2, device="cuda")
    return Rotation(angles.cos(), angles.sin())


def test_steps_planned_ahead_leave_each_other_alone():
    torch.manual_seed(0)
    cascade = FlashInferBackend(16, Heads(8, 2, 128), library, fold_below=0, kernel="fa2")
    steps = [decodes(30 + 7 * i, 200 + 30 * i, 20 + 5 * i) for i in range(6)]
    inputs = [torch.randn(len(s.slots), 12, 128, device="cuda").bfloat16() for s in steps]
    turns = [rotation(len(s.slots), 128) for s in steps]
    cache = torch.randn(2, 400, 16, 2, 128, device="cuda").bfloat16()

    def put_later(array):
        return torch.from_numpy(array).pin_memory().to("cuda", non_blocking=True)

    def run(step, qkv, turn):
        keys, values = cache.clone()
        return cascade.plan(step, turn, put_later).run(qkv.clone(), keys, values)

    each = list(zip(steps, inputs, turns, strict=True))
    alone = [run(*one).cpu() for one in each]
    torch.cuda._sleep(200_000_000)  # the device is busy for a tenth of a second
    together = [run(*one) for one in each]
    for got, expected in zip(together, alone, strict=True):
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotation_and_write_equal_torchs(head_dim):
    torch.manual_seed(0)
    step, turn = decodes(37, 50, 21), rotation(37, head_dim)
    qkv = torch.randn(37, 10, head_dim, device="cuda").bfloat16()
    caches = torch.zeros(2, 2, 120, 16, 2, head_dim, device="cuda", dtype=torch.bfloat16)
    slots = torch.from_numpy(step.slots).cuda()
    expected, _, _ = rotate_and_write(turn, slots, qkv.clone(), *caches[0])
    cos_sin = torch.cat([turn.cos, turn.sin], dim=1)
    got = Write(library, slots.int()).run(cos_sin, qkv.clone(), *caches[1])
    rounding = {"atol": 1e-6, "rtol": 2**-7}
    torch.testing.assert_close(got, expected, **rounding)
    torch.testing.assert_close(caches[1, 0], caches[0, 0], **rounding)
    assert torch.equal(caches[1, 1], caches[0, 1]) and caches[0, 1].any()


@pytest.mark.parametrize("rows", [0, 1, 300])
@pytest.mark.parametrize("with_delta", [False, True])
def test_rms_norm_adds_in_place_and_equals_torch(rows, with_delta):
    torch.manual_seed(0)
    hidden, delta, exact = (torch.randn(rows, 576, device="cuda").bfloat16() * 3 for _ in range(3))
    weight = torch.randn(576, device="cuda").bfloat16()
    exact.copy_(hidden)
    expected = TorchOperations().add_rms_norm(
        exact, delta.clone() if with_delta else None, weight, 1e-5
    )
    got = FlashInferOperations(TorchOperations(), library).add_rms_norm(
        hidden, delta if with_delta else None, weight, 1e-5
    )
    assert torch.equal(hidden, exact)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize("rows", [0, 3, 300])
def test_gate_equals_torch(rows):
    gate_up = torch.randn(rows, 2 * 1536, device="cuda").bfloat16() * 3
    expected = TorchOperations().silu_and_multiply(gate_up.float())
    got = FlashInferOperations(TorchOperations(), library).silu_and_multiply(gate_up)
    torch.testing.assert_close(got.float(), expected, atol=1e-5, rtol=1e-2)


def test_argmax_is_the_first_of_the_largest_and_finds_none_in_unusable_rows():
    logits = torch.zeros(5, 70_000, device="cuda").bfloat16()
    logits[0, [40_000, 123, 69_999]] = 3
    logits[1, 7], logits[2], logits[3, 9] = torch.nan, -torch.inf, torch.inf
    assert FlashInferOperations(TorchOperations(), library).argmax(logits).tolist() == [
        123,
        -1,
        -1,
        -1,
        0,
    ]


def sample(logits, each, rows=None):
    def put(array):
        return torch.from_numpy(array).cuda()

    draws = put_draws(make_samples(each, rows), logits.shape[-1], put)
    return (
        sample_on_device(logits, draws, TorchOperations().argmax, FlashInferDraw(library))
        .cpu()
        .numpy()
    )


@pytest.mark.parametrize("vocab_size", [16, 5000])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.6), (3, 0.6), (12, 0.9), (12, 1.0), (1, 1.0)]
)
def test_draws_follow_the_filtered_distribution(vocab_size, top_k, top_p):
    count, temperature = 20_000 if vocab_size == 16 else 2000, 1.7
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(1)) * 2
    order = logits.argsort(descending=True)
    expected = (logits / temperature)[order]
    expected[top_k or vocab_size :] = -torch.inf
    expected = expected.softmax(0)
    expected[(expected.cumsum(0) - expected) >= top_p] = 0
    expected /= expected.sum()
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=5)
    drawn = sample(logits.cuda().expand(count, -1), [params] * count)
    share = torch.bincount(torch.from_numpy(drawn), minlength=vocab_size)[order] / count
    assert share[expected == 0].sum() < 2e-3  # where sums are rounded one may be kept more
    torch.testing.assert_close(share, expected, atol=0.012 if vocab_size == 16 else 0.03, rtol=0)


def test_unusable_rows_get_no_token_and_a_row_draws_the_same_whatever_the_batch():
    torch.manual_seed(0)
    logits = torch.randn(40, 5000, device="cuda").bfloat16()
    each = [
        SamplingParams(temperature=(i % 4) / 2, top_k=i % 5 * 20, top_p=1 - i % 3 / 4)
        for i in range(40)
    ]
    good = sample(logits, each)
    rows = np.arange(40)[::-1].copy()
    assert sample(logits.flip(0), each[::-1], rows).tolist() == good[::-1].tolist()
    bad = [3, 5, 14, 22]
    logits[3, 17], logits[5], logits[14, 9], logits[22, 4999] = (
        torch.nan,
        torch.nan,
        torch.inf,
        torch.nan,
    )
    got = sample(logits, each)
    assert got[bad].tolist() == [NO_TOKEN] * 4
    others = np.setdiff1d(np.arange(40), bad)
    assert got[others].tolist() == good[others].tolist()
