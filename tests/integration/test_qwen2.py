"""The Qwen 2 architecture on tiny random models: what transformers computes, from every format."""

import numpy as np
import pytest
import torch
from builders import random_weights, tiny_config, write_gguf_model, write_tokenizer

from batchllm import LLM, SamplingParams
from batchllm.models.checkpoint import open_checkpoint
from batchllm.prefix.plan import plan_requests
from batchllm.request import Request
from batchllm.runner.model_input import build_model_input
from batchllm.scheduler.batch import StepOutput


def prompts():
    """Of 1 to 60 tokens, most of them below a shared beginning."""
    rng = np.random.default_rng(0)
    head = rng.integers(3, 270, 30)
    tails = [rng.integers(3, 270, 1 + i * 5 % 31) for i in range(7)]
    return [*(np.concatenate([head, tail]) for tail in tails), rng.integers(3, 270, 1)]


def next_logits(llm, prompts):
    """Of each prompt's next token, all computed as one shared batch."""
    requests = [
        Request(i, prompt.astype(np.int32), SamplingParams(max_tokens=1))
        for i, prompt in enumerate(prompts)
    ]
    scheduler = llm.new_scheduler()
    scheduler.add(plan_requests(requests))
    found = {}
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        step = build_model_input(batch, llm.config.block_size)
        logits = llm.runner.logits(step)
        found |= dict(zip(step.samples.row_index.tolist(), logits, strict=True))
        scheduler.update(batch, StepOutput(logits.argmax(-1).numpy().astype(np.int32)))
    return torch.stack([found[i] for i in range(len(prompts))])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_logits_are_those_of_transformers(tmp_path, tied, backend):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=270,
            hidden_size=96,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # transformers begins with biases of zero, which would hide them
            torch.nn.init.normal_(parameter, std=0.5 if name.endswith("bias") else 0.1)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    llm = LLM(tmp_path, dtype="float32", kv_memory=16 << 20, attention_backend=backend)
    assert llm.checkpoint.config.architecture == "Qwen2ForCausalLM"
    with torch.inference_mode():
        theirs = [model(torch.tensor(prompt[None])).logits[0, -1] for prompt in prompts()]
    torch.testing.assert_close(
        next_logits(llm, prompts()), torch.stack(theirs), atol=1e-4, rtol=1e-4
    )


def test_a_gguf_file_holds_the_same_model(tmp_path):
    """llama.cpp's converter leaves the rows of Qwen 2's queries and keys where they are."""
    config = tiny_config(architectures=["Qwen2ForCausalLM"])
    weights = random_weights(config)
    checkpoint = open_checkpoint(
        write_gguf_model(tmp_path / "m.gguf", config=config, weights=weights)
    )
    loaded = dict(checkpoint.weights())
    assert loaded.keys() == weights.keys()
    for name, tensor in loaded.items():
        np.testing.assert_array_equal(tensor.numpy(), weights[name])
