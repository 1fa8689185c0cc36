"""A planned step through a model's layers."""

import torch

from batchllm.attention.backend import LayerPlan
from batchllm.models.registry import Model
from batchllm.runner.kv_cache import KVCache


def run_layers(
    model: Model,
    cache: KVCache,
    plan: LayerPlan,
    token_ids: torch.Tensor,
    sample_rows: torch.Tensor,
) -> torch.Tensor:
    """Hidden states [num_samples, hidden_size] of the tokens to sample; see `Model.forward`."""

    def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
        return plan.run(qkv, cache.keys[layer], cache.values[layer])

    return model.forward(token_ids, attend, sample_rows)
