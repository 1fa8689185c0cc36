"""Products and KV in eight bits beside what they round."""

import pytest
import torch

from batchllm import LLM, SamplingParams
from batchllm.attention.backend import why_not_native
from batchllm.attention.rounded import round_rows
from batchllm.errors import UsageError
from batchllm.models.float8_linear import pack_float8, pack_scaled_mm, round_to_float8
from batchllm.models.linear import pack_torch

KV_INT8 = {"kv_cache_dtype": "int8"}
PARAMS = SamplingParams(max_tokens=8)
PROMPTS = [f"shared words and {i} more" for i in range(6)]


def exact(x, weight, bias):
    """The product of the rounded values, in float64."""
    (rows, row_scales), (outputs, scales) = round_to_float8(x), round_to_float8(weight)
    product = (rows.double() * row_scales) @ (outputs.double() * scales).T
    return product if bias is None else product + bias.double()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (50, 24)])
@pytest.mark.parametrize(
    "pack", [pack_scaled_mm, lambda w, b: pack_float8(w, b, pack_torch)], ids=["scaled_mm", "wide"]
)
def test_products_are_those_of_the_rounded_values(pack, shape, has_bias):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.bfloat16) * torch.rand(shape[0], 1) * 30
    bias = torch.randn(shape[0], dtype=torch.bfloat16) if has_bias else None
    x = torch.randn(7, shape[1], dtype=torch.bfloat16) * 10 ** torch.arange(-3.0, 4)[:, None]
    x[3] = 0
    weight, x = weight.bfloat16(), x.bfloat16()
    got, expected = pack(weight, bias)(x), exact(x, weight, bias)
    scale = expected.abs().amax(dim=1, keepdim=True).clamp(min=1e-9)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - expected).abs() / scale).max() < 0.01


def test_float8_rows_stay_within_their_step():
    rows = torch.randn(20, 64) * 10 ** torch.linspace(-4, 4, 20)[:, None]
    rounded, scales = round_to_float8(rows)
    error = (rounded.float() * scales - rows).abs()
    assert (error <= rows.abs() / 16 + scales * 2**-10).all()


@pytest.mark.parametrize("kv_dtype, bound", [(torch.float8_e4m3fn, 1 / 16), (torch.int8, 1 / 100)])
def test_kv_is_rounded_as_its_type_says(kv_dtype, bound):
    rows = torch.randn(5, 3, 64)
    error = (round_rows(rows, kv_dtype) - rows).abs() / rows.abs().amax(-1, keepdim=True)
    assert 0 < error.max() < bound


@pytest.mark.parametrize("option", [{"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}, KV_INT8])
def test_eight_bits_answer_and_change_logits_a_little(tiny_model, option):
    llm = LLM(tiny_model, kv_memory=16 << 20, **option)
    outputs = llm.generate(PROMPTS, PARAMS)
    assert [o.finish_reason for o in outputs] == ["length"] * len(PROMPTS)
    again = LLM(tiny_model, kv_memory=16 << 20, **option).generate(PROMPTS, PARAMS)
    assert [o.text for o in again] == [o.text for o in outputs]


def test_int8_kv_is_named_and_holds_more_tokens_where_kernels_keep_it(tiny_model):
    def loaded(**options):
        return LLM(tiny_model, dtype="float32", kv_memory=1 << 20, **options)

    plain, rounded = loaded(), loaded(kv_cache_dtype="int8", attention_backend="torch")
    assert "KV" not in plain.attention and rounded.attention == "torch, KV rounded to int8"
    assert rounded.num_kv_tokens == plain.num_kv_tokens
    if why_not_native(16, 16) is not None:
        pytest.skip("no kernels were compiled")
    kept = loaded(kv_cache_dtype="int8")
    assert "), KV in int8" in kept.describe()
    assert kept.kv_memory <= 1 << 20
    row = 16 * 4 / (16 + 4)  # four bytes a number to one, and a scale
    assert kept.num_kv_tokens == pytest.approx(row * plain.num_kv_tokens, rel=0.05)
    answers = kept.generate(PROMPTS, PARAMS)
    assert [o.text for o in answers] == [o.text for o in rounded.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("option", [{"kv_cache_dtype": "fp4"}, {"quantization": "fp4"}])
def test_unknown_types_name_the_known(option):
    with pytest.raises(UsageError, match="fp8"):
        LLM(**option)
