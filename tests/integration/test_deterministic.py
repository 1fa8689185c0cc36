"""`deterministic`: the same logits to the last bit, whatever shares a batch with a row."""

import numpy as np
import pytest
import torch
from builders import tiny_config, write_safetensors_model

import batchllm.runner.torch_runner as torch_runner
from batchllm import LLM, SamplingParams
from batchllm.errors import UsageError
from batchllm.native.kernels import load_kernels

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no kernels were compiled")
SETTINGS = [
    {},
    {"sharing": False},
    {"threads": 1, "max_num_batched_tokens": 37},
    {"max_num_seqs": 3},
    {"policy": "ratio", "max_num_batched_tokens": 100},
    {"policy": "streaming"},
]


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """By the size of their heads."""
    config = tiny_config(max_position_embeddings=512, head_dim=64)
    wide = write_safetensors_model(tmp_path_factory.mktemp("models") / "wide", config=config)
    return {16: tiny_model, 64: wide}


@pytest.fixture
def prompts():
    """Below beginnings of 0 to 200 tokens, most of which end within a multiple of 64."""
    rng = np.random.default_rng(0)
    heads = [rng.integers(3, 200, size).tolist() for size in (0, 40, 64, 100, 130, 200)]
    heads += [heads[-1][:150] + rng.integers(3, 200, 20).tolist(), heads[3] + heads[1]]
    return [
        head + rng.integers(3, 200, int(rng.integers(1, 90))).tolist()
        for head in heads
        for _ in range(4)
    ]


@pytest.fixture
def logits_of(monkeypatch):
    """Answers and logits of each row and position, as bytes; and the engine that gave them."""
    sample = torch_runner.TorchRunner._sample

    def run(model, prompts, params, **options):
        seen = {}

        def look(runner, hidden, samples):
            logits = runner._model.logits(hidden)
            rows = zip(samples.row_index.tolist(), samples.output_position.tolist(), strict=True)
            for place, row in zip(rows, logits, strict=True):
                data = row.clone().view(torch.uint8).numpy().tobytes()
                assert seen.setdefault(place, data) == data, "computed again, and differently"
            return sample(runner, hidden, samples)

        monkeypatch.setattr(torch_runner.TorchRunner, "_sample", look)
        llm = LLM(model, **{"kv_memory": 16 << 20, **options})
        outputs = llm.generate(prompts, params)
        return [o.output_token_ids.tolist() for o in outputs], seen, llm

    return run


@pytest.mark.parametrize(
    ("head_dim", "dtype", "quantization", "kv_cache_dtype", "temperature"),
    [
        (16, "bfloat16", None, "auto", 0.0),
        (16, "float32", None, "auto", 0.7),
        (16, "bfloat16", "int8", "auto", 0.7),
        (16, "float32", "int8", "int8", 0.0),
        (64, "bfloat16", None, "auto", 0.0),  # whole matrix tiles, where there are any
        (64, "bfloat16", None, "int8", 0.7),
    ],
)
def test_logits_are_the_same_to_the_last_bit(
    models, prompts, logits_of, head_dim, dtype, quantization, kv_cache_dtype, temperature
):
    params = SamplingParams(max_tokens=12, temperature=temperature, top_p=0.9, ignore_eos=True)
    options = {"dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    options["deterministic"] = True
    tiny_model = models[head_dim]
    answers, expected, llm = logits_of(tiny_model, prompts, params, **options)
    assert llm.metrics.saved_share > 0.1
    for setting in SETTINGS[1:]:
        again, found, _ = logits_of(tiny_model, prompts, params, **options, **setting)
        assert again == answers, setting
        assert found == expected, setting
    # Those that run out of room: preempted rows are computed twice.
    room = {"kv_memory": llm.kv_memory * 420 // llm.num_kv_tokens}
    small = LLM(tiny_model, **options, **room)
    for _ in range(100):  # teach it that answers are short, so that it admits too much
        small._scheduler.lengths.observe(np.array([1]), np.array([12]))
    outputs = small.generate(
        prompts, SamplingParams(max_tokens=12, temperature=temperature, top_p=0.9)
    )
    plain = LLM(tiny_model, **options, kv_memory=16 << 20).generate(
        prompts, SamplingParams(max_tokens=12, temperature=temperature, top_p=0.9)
    )
    assert [o.text for o in outputs] == [o.text for o in plain]


def test_without_it_they_are_not(tiny_model, prompts, logits_of):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    all_logits = [
        logits_of(tiny_model, prompts, params, dtype="bfloat16", **setting)[1]
        for setting in SETTINGS
    ]
    assert any(logits != all_logits[0] for logits in all_logits[1:])


def test_where_it_cannot_be_it_is_refused(tiny_model):
    with pytest.raises(UsageError, match="deterministic needs the compiled kernels: the attention"):
        LLM(tiny_model, deterministic=True, attention_backend="torch")
