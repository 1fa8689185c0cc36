"""Smoothing a model before it is rounded to eight bits, by running a text of ours through it."""

from importlib.resources import files

import numpy as np
import torch

from batchllm.attention.backend import AttentionBackend
from batchllm.models.registry import Model
from batchllm.request import TokenIds
from batchllm.runner.kv_cache import KVCache, memory_of
from batchllm.runner.model_input import AttentionItems, ModelInput
from batchllm.runner.staging import put_now
from batchllm.scheduler.batch import Samples

_CPU = torch.device("cpu")


def smoothing_text() -> str:
    """Prose, talk, code and figures.

    Our own and always the same, so that a job's rows do not change its answers.
    """
    return (files("batchllm.runner") / "smoothing.txt").read_text(encoding="utf-8")


@torch.inference_mode()
def smooth(
    model: Model,
    backend: AttentionBackend,
    tokens: TokenIds,
    block_size: int,
    kv_dtype: torch.dtype,
    device: torch.device = _CPU,
) -> None:
    """Run a prompt, int32 [num_tokens], through the model, and smooth by what that shows.

    The device is the model's, and torch's default where it is not the CPU; `kv_dtype` is what the
    backend keeps keys and values in.
    """
    num_blocks = -(-len(tokens) // block_size)
    shape = model.config
    cache = KVCache(
        num_layers=shape.num_layers,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=kv_dtype,
        allocate=memory_of(device),
    )
    step, put = _one_prompt(tokens, num_blocks), put_now(device)
    plan = backend.plan(step, model.rotary(put(step.positions)), put)
    model.smooth(
        put(tokens),
        lambda layer, qkv: plan.run(qkv, cache.keys[layer], cache.values[layer]),
    )


def _one_prompt(tokens: TokenIds, num_blocks: int) -> ModelInput:
    """A step of one prompt, its KV in the first blocks."""
    count = len(tokens)
    places = np.arange(count)
    items = AttentionItems(
        query_begin=np.array([0]),
        query_end=np.array([count]),
        kv_start=np.array([0]),
        kv_len=np.array([count]),
        own=np.array([True]),
        block_offsets=np.array([0, num_blocks]),
        block_ids=np.arange(num_blocks),
    )
    none = np.zeros(0, dtype=np.int64)
    nobody = Samples(none, none, none, none, none, none, params=[])
    return ModelInput(tokens, places, places, items, places, nobody)
