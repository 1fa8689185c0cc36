"""What is done with a model's files when a job starts, short of the engine."""

import torch

from batchllm.config import EngineConfig
from batchllm.prompting import prompt_builder
from batchllm.text.prompts import PromptSpec
from fuzzing.texts import check_rows, random_texts, table_of

_SPECS = [PromptSpec(prompt_column="t"), PromptSpec(prompt_column="t", chat=False)]


def use(checkpoint, rng):
    """Identity, tokenizer, prompts; sometimes the weights."""
    checkpoint.identity()
    tokenizer = checkpoint.tokenizer()
    _ = tokenizer.fingerprint
    builder = prompt_builder(checkpoint, EngineConfig(), rng.choice(_SPECS))
    check_rows(builder.build(table_of(random_texts(rng))))
    tokenizer.decode_batch([torch.tensor([0, 2, 5, tokenizer.vocab_size - 1]).numpy()])
    if rng.random() < 0.3:
        for _, tensor in checkpoint.weights(torch.float32):
            assert tensor.dtype == torch.float32
