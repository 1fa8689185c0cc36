"""Hugging Face's implementation, the yardstick for weights, logits and answers."""

import copy
from functools import cache

import torch
import torch.nn.functional as F

from batchllm.runner.dtype import has_fast_bfloat16

FLOAT32_ROUNDING = 1e-3


@cache
def load_gguf_model(path, dtype=torch.float32):
    """Load a GGUF file as `from_pretrained(gguf_file=…)` does, less its demand for accelerate."""
    model = copy.deepcopy(_read_gguf_model(path)).to(dtype).eval()
    if dtype == torch.bfloat16 and not has_fast_bfloat16():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.forward = _widened(module)
    return model


@cache
def _read_gguf_model(path):
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)  # asked for by each of 400 modules
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def _widened(linear):
    """The same product, by float32: torch's own takes ten times as long on such a processor."""
    weight = linear.weight.detach().float()
    assert linear.bias is None
    return lambda x: F.linear(x.float(), weight).to(x.dtype)


def check_greedy(oracle, truth, eos, prompt, answer, num_tokens):
    """Each token is the oracle's likeliest after those before it, or rounding alone decided.

    That is where the oracle's logits of the two tokens are no further apart than twice (one error a
    token) the most that rounding moved any of its own logits at that very place. The answer ends
    where the oracle ends it. Returns how many tokens are not its likeliest.
    """
    assert not set(answer[:-1]) & eos, f"{answer} goes on after its end"
    assert len(answer) == num_tokens or answer[-1] in eos, f"{answer} ends too early"
    logits = logits_along(oracle, tuple(prompt), tuple(answer))
    best = logits.argmax(-1).tolist()
    different = [
        i for i, (ours, theirs) in enumerate(zip(answer, best, strict=True)) if ours != theirs
    ]
    for at in different:
        exact = logits_along(truth, tuple(prompt), tuple(answer))[at]
        rounding = max(2 * float((logits[at] - exact).abs().max()), FLOAT32_ROUNDING)
        gap = float(logits[at, best[at]] - logits[at, answer[at]])
        assert gap <= rounding, (
            f"prompt of {len(prompt)} tokens, output {at}: ours {answer[at]}, theirs {best[at]}, "
            f"whose logits are {gap:.3f} apart; rounding explains {rounding:.3f}"
        )
    return len(different)


@cache
def logits_along(model, prompt, answer):
    """What Hugging Face would choose each token of an answer by, float32 [len(answer), num_vocab].

    One pass over prompt and answer takes a tenth of generating it; several tests ask for the same.
    """
    tokens = torch.tensor([prompt + answer[:-1]])
    with torch.inference_mode():
        return model(tokens, logits_to_keep=len(answer)).logits[0].float()
