"""From an opened checkpoint to a runner and its block pool."""

import torch

from batchllm.attention.backend import AttentionBackend, make_backend, why_not_native
from batchllm.attention.native import NativeBackend
from batchllm.attention.rounded import RoundedBackend
from batchllm.cache.memory import free_memory, num_kv_blocks
from batchllm.config import EngineConfig
from batchllm.errors import UsageError
from batchllm.models.checkpoint import Checkpoint
from batchllm.models.config import ModelConfig
from batchllm.models.fake_checkpoint import FAKE_MODEL, FakeCheckpoint
from batchllm.models.native_operations import NativeOperations
from batchllm.models.operations import Operations, TorchOperations
from batchllm.models.parallel import WHOLE, Shard
from batchllm.runner.choose_device import choose_device
from batchllm.runner.dtype import choose_dtype
from batchllm.runner.hash_runner import HashRunner
from batchllm.runner.kv_cache import KVCache, cache_dtype, kv_bytes_per_token
from batchllm.runner.load_device import load_on_gpu
from batchllm.runner.load_model import load_model
from batchllm.runner.loaded import LoadedRunner, usable_blocks
from batchllm.runner.threads import Threads, available_cpus, choose_threads
from batchllm.runner.timed import Clock, TimedBackend, TimedOperations
from batchllm.runner.torch_runner import TorchRunner

_CPU = torch.device("cpu")


def load_runner(
    checkpoint: Checkpoint,
    config: EngineConfig,
    max_model_len: int,
    clock: Clock | None = None,
    shard: Shard = WHOLE,
) -> LoadedRunner:
    """Load the weights, or a shard of them, then size the KV cache by the memory that is left.

    The number of threads is torch's, so it holds for the whole process. A clock is for measuring.
    """
    threads = choose_threads(
        config.threads, available_cpus(), openmp_threads=torch.get_num_threads()
    )
    torch.set_num_threads(max(threads.count // config.num_processes, 1))
    if isinstance(checkpoint, FakeCheckpoint):
        if clock is not None:
            raise UsageError(f"model {FAKE_MODEL!r} has nothing to measure")
        return _load_fake(checkpoint, config, max_model_len, threads)
    load = {"cpu": _load_on_cpu, "cuda": load_on_gpu}[choose_device(config.device)]
    return load(checkpoint, config, max_model_len, threads, clock, shard)


def _load_on_cpu(
    checkpoint: Checkpoint,
    config: EngineConfig,
    max_model_len: int,
    threads: Threads,
    clock: Clock | None,
    shard: Shard,
) -> LoadedRunner:
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
    if isinstance(backend, NativeBackend):
        operations = NativeOperations(backend.kernels, deterministic=config.deterministic)
    if clock is not None:
        backend, operations = TimedBackend(backend, clock), TimedOperations(operations, clock)
    if (kv_dtype := cache_dtype(config.kv_cache_dtype)) is not None:
        backend = RoundedBackend(backend, kv_dtype)  # in no less memory: its effect is to be seen
    model = load_model(checkpoint, config, max_model_len, backend, operations, dtype, _CPU, shard)
    shard.least(0)  # the others may not have taken the memory of their weights yet
    num_blocks = shard.least(_num_blocks(shape, config, max_model_len, dtype))
    cache = KVCache(
        num_layers=shape.num_layers,
        num_blocks=num_blocks,
        block_size=config.block_size,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=dtype,
    )
    runner = TorchRunner(model, cache, backend, operations, config.block_size)
    return LoadedRunner(
        runner,
        cache.num_blocks,
        num_blocks,
        name,
        threads,
        backend.name,
        slower,
        backend.granularity,
    )


def _num_blocks(
    shape: ModelConfig, config: EngineConfig, max_model_len: int, dtype: torch.dtype
) -> int:
    block_bytes = config.block_size * kv_bytes_per_token(
        shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype
    )
    free = free_memory() // config.num_processes
    num_blocks = num_kv_blocks(config.kv_memory_each, block_bytes, free)
    return min(num_blocks, usable_blocks(config, "cpu", max_model_len))


def _load_fake(
    checkpoint: FakeCheckpoint, config: EngineConfig, max_model_len: int, threads: Threads
) -> LoadedRunner:
    """The runner of `fake`, with as much KV as a model of its sizes would have."""
    shape = checkpoint.config
    num_blocks = _num_blocks(shape, config, max_model_len, torch.float32)
    runner = HashRunner(num_blocks, config.block_size, max_model_len, checkpoint.answer_token_ids)
    return LoadedRunner(runner, num_blocks, num_blocks, shape.dtype, threads, "none", None)
