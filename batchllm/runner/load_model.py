"""From an opened checkpoint to a model on a device, its weights packed for products."""

import torch

from batchllm.attention.backend import AttentionBackend
from batchllm.config import EngineConfig
from batchllm.models.checkpoint import Checkpoint
from batchllm.models.dummy_checkpoint import DummyCheckpoint
from batchllm.models.operations import Operations
from batchllm.models.parallel import WHOLE, Shard
from batchllm.models.registry import Model, make_model
from batchllm.request import TokenIds
from batchllm.runner.smooth import smooth, smoothing_text

_RANDOM_SMOOTHING_TOKENS = 512


def load_model(
    checkpoint: Checkpoint,
    config: EngineConfig,
    max_model_len: int,
    backend: AttentionBackend,
    operations: Operations,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: torch.dtype,
    shard: Shard = WHOLE,
) -> Model:
    """Load the weights, one tensor at a time; round them if the config says so, and pack them.

    `kv_dtype` is what the backend keeps keys and values in.
    """
    with device:  # where new tensors go
        model = make_model(checkpoint.config, dtype, operations, shard)
        model.load(checkpoint.weights(dtype, shard.part))
        if config.quantization == "int8":
            tokens = _smoothing_tokens(checkpoint)[:max_model_len]
            smooth(model, backend, tokens, config.block_size, kv_dtype, device)
        model.pack(config.quantization)
    return model


def _smoothing_tokens(checkpoint: Checkpoint) -> TokenIds:
    if isinstance(checkpoint, DummyCheckpoint):  # no text means anything to it
        return checkpoint.random_token_ids(_RANDOM_SMOOTHING_TOKENS)
    tokenizer = checkpoint.tokenizer()
    return tokenizer.encode_batch([smoothing_text()], add_special_tokens=True).values
