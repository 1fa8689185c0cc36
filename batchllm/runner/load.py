"""From an opened checkpoint to a runner and its block pool."""

from dataclasses import dataclass

import torch

from batchllm.attention.backend import AttentionBackend, make_backend, why_not_native
from batchllm.attention.native import NativeBackend
from batchllm.cache.memory import free_memory, num_kv_blocks
from batchllm.config import EngineConfig
from batchllm.errors import UsageError
from batchllm.models.checkpoint import Checkpoint
from batchllm.models.config import ModelConfig
from batchllm.models.dummy_checkpoint import DummyCheckpoint
from batchllm.models.fake_checkpoint import FAKE_MODEL, FakeCheckpoint
from batchllm.models.native_operations import NativeOperations
from batchllm.models.operations import Operations, TorchOperations
from batchllm.models.registry import make_model
from batchllm.request import TokenIds
from batchllm.runner.dtype import choose_dtype
from batchllm.runner.hash_runner import HashRunner
from batchllm.runner.kv_cache import KVCache, kv_bytes_per_token
from batchllm.runner.smooth import smooth, smoothing_text
from batchllm.runner.threads import Threads, available_cpus, choose_threads
from batchllm.runner.timed import Clock, TimedBackend, TimedOperations
from batchllm.runner.torch_runner import TorchRunner

_RANDOM_SMOOTHING_TOKENS = 512


@dataclass(frozen=True, slots=True)
class LoadedRunner:
    """A runner ready for steps, with `num_blocks` of KV; `dtype` is what `auto` came to.

    `wanted_blocks` are more where the system did not give all the memory that was to be KV.

    Segments of KV must begin at multiples of `granularity`. `attention` names the backend; `slower`
    says why it is not the compiled one, where that was not the user's choice.
    """

    runner: TorchRunner | HashRunner
    num_blocks: int
    wanted_blocks: int
    dtype: str
    threads: Threads
    attention: str
    slower: str | None
    granularity: int = 1


def load_runner(
    checkpoint: Checkpoint,
    config: EngineConfig,
    max_model_len: int,
    clock: Clock | None = None,
) -> LoadedRunner:
    """Load the weights, then size the KV cache by the memory that is left.

    The number of threads is torch's, so it holds for the whole process. A clock is for measuring.
    """
    threads = choose_threads(
        config.threads, available_cpus(), openmp_threads=torch.get_num_threads()
    )
    torch.set_num_threads(threads.count)
    if isinstance(checkpoint, FakeCheckpoint):
        if clock is not None:
            raise UsageError(f"model {FAKE_MODEL!r} has nothing to measure")
        return _load_fake(checkpoint, config, max_model_len, threads)
    shape = checkpoint.config
    name = choose_dtype(config, shape.dtype)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
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
    model = make_model(shape, dtype, operations)
    model.load(checkpoint.weights(dtype))
    if config.quantization is not None:
        tokens = _smoothing_tokens(checkpoint)
        smooth(model, backend, tokens[:max_model_len], config.block_size)
    model.pack(config.quantization)
    num_blocks = _num_blocks(shape, config, max_model_len, dtype)
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


def _smoothing_tokens(checkpoint: Checkpoint) -> TokenIds:
    if isinstance(checkpoint, DummyCheckpoint):  # no text means anything to it
        return checkpoint.random_token_ids(_RANDOM_SMOOTHING_TOKENS)
    tokenizer = checkpoint.tokenizer()
    return tokenizer.encode_batch([smoothing_text()], add_special_tokens=True).values


def _num_blocks(
    shape: ModelConfig, config: EngineConfig, max_model_len: int, dtype: torch.dtype
) -> int:
    block_bytes = config.block_size * kv_bytes_per_token(
        shape.num_layers, shape.num_kv_heads, shape.head_dim, dtype
    )
    num_blocks = num_kv_blocks(config.kv_memory, block_bytes, free_memory())
    # More than every sequence at its longest can never be used.
    most = config.max_num_seqs * -(-max_model_len // config.block_size)
    return min(num_blocks, most)


def _load_fake(
    checkpoint: FakeCheckpoint, config: EngineConfig, max_model_len: int, threads: Threads
) -> LoadedRunner:
    """The runner of `fake`, with as much KV as a model of its sizes would have."""
    shape = checkpoint.config
    num_blocks = _num_blocks(shape, config, max_model_len, torch.float32)
    runner = HashRunner(num_blocks, config.block_size, max_model_len, checkpoint.answer_token_ids)
    return LoadedRunner(runner, num_blocks, num_blocks, shape.dtype, threads, "none", None)
