"""Hugging Face's implementation, the yardstick for weights, logits and answers."""

from functools import cache

import torch
import torch.nn.functional as F

from batchllm.runner.dtype import has_fast_bfloat16


@cache
def load_gguf_model(path, dtype=torch.float32):
    """Load a GGUF file as `from_pretrained(gguf_file=…)` does, less its demand for accelerate."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    model = model.to(dtype).eval()
    if dtype == torch.bfloat16 and not has_fast_bfloat16():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.forward = _widened(module)
    return model


def _widened(linear):
    """The same product, by float32: torch's own takes ten times as long on such a processor."""
    weight = linear.weight.detach().float()
    assert linear.bias is None
    return lambda x: F.linear(x.float(), weight).to(x.dtype)
