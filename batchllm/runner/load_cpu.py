"""From an opened checkpoint to a runner on the CPU and its block pool."""

import torch

from batchllm.attention.backend import AttentionBackend, make_backend, why_not_native
from batchllm.attention.native import NativeBackend
from batchllm.attention.rounded import RoundedBackend
from batchllm.config import EngineConfig
from batchllm.models.checkpoint import Checkpoint
from batchllm.models.native_operations import NativeOperations
from batchllm.models.operations import Operations, TorchOperations
from batchllm.models.parallel import Shard
from batchllm.runner.clock import Clock
from batchllm.runner.dtype import choose_dtype
from batchllm.runner.kv_cache import KVCache, cache_dtype, kv_bytes_per_token
from batchllm.runner.load_model import load_model
from batchllm.runner.loaded import LoadedRunner, affordable_blocks
from batchllm.runner.threads import Threads
from batchllm.runner.timed import TimedBackend, TimedOperations
from batchllm.runner.torch_runner import TorchRunner

_CPU = torch.device("cpu")


def load_on_cpu(
    checkpoint: Checkpoint,
    config: EngineConfig,
    max_model_len: int,
    threads: Threads,
    clock: Clock | None,
    shard: Shard,
) -> LoadedRunner:
    """Load the weights, or a shard of them, then size the KV cache by the memory that is left."""
    shape = shard.config(checkpoint.config)
    name = choose_dtype(config, shape.dtype)
    dtype = getattr(torch, name)
    backend: AttentionBackend = make_backend(
        config.attention_backend,
        config.block_size,
        shape.head_dim,
        deterministic=config.deterministic,
    )
    operations: Operations = TorchOperations()
    slower = None
    if config.attention_backend == "auto":
        slower = why_not_native(config.block_size, shape.head_dim)
    kept, asked = dtype, cache_dtype(config.kv_cache_dtype)
    if isinstance(backend, NativeBackend):
        operations = NativeOperations(backend.kernels, deterministic=config.deterministic)
        kept = asked if asked == torch.int8 else dtype
    if clock is not None:
        backend, operations = TimedBackend(backend, clock), TimedOperations(operations, clock)
    if asked not in (None, kept):
        backend = RoundedBackend(backend, asked)  # in no less memory: its effect is to be seen
    model = load_model(
        checkpoint, config, max_model_len, backend, operations, dtype, _CPU, kept, shard
    )
    shard.least(0)  # the others may not have taken the memory of their weights yet
    kv_bytes = kv_bytes_per_token(shape.num_layers, shape.num_kv_heads, shape.head_dim, kept)
    num_blocks = shard.least(affordable_blocks(config, kv_bytes, max_model_len))
    cache = KVCache(
        num_layers=shape.num_layers,
        num_blocks=num_blocks,
        block_size=config.block_size,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=kept,
    )
    runner = TorchRunner(model, cache, backend, operations, config.block_size)
    return LoadedRunner(
        runner,
        cache.num_blocks,
        num_blocks,
        name,
        threads,
        backend.name if kept == dtype else f"{backend.name}, KV in int8",
        slower,
        backend.granularity,
        kv_bytes_per_token=None if kept == dtype else kv_bytes,
    )
