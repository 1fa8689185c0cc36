"""From an opened checkpoint to a runner on a GPU, its KV pool sized by trying the fullest steps."""

from functools import partial
from typing import Any

import torch

from batchllm.attention.backend import (
    AttentionBackend,
    GraphBackend,
    Heads,
    SharingBackend,
    make_backend,
)
from batchllm.attention.flashinfer import FlashInferBackend
from batchllm.attention.timing import Sizes, gpu_seconds, measure_share
from batchllm.cache.memory import num_kv_blocks, ran_out_of_memory
from batchllm.config import EngineConfig
from batchllm.errors import UsageError
from batchllm.flashinfer_library import load_flashinfer
from batchllm.models.checkpoint import Checkpoint
from batchllm.models.config import ModelConfig
from batchllm.models.device_operations import DeviceOperations
from batchllm.models.flashinfer_operations import FlashInferOperations
from batchllm.models.operations import Operations
from batchllm.models.parallel import WHOLE, Shard
from batchllm.runner.clock import Clock
from batchllm.runner.device import CudaDevice, Device
from batchllm.runner.device_runner import DeviceRunner
from batchllm.runner.dtype import choose_dtype
from batchllm.runner.fullest_steps import FullestSteps
from batchllm.runner.graphs import CudaGraphs, Recorder
from batchllm.runner.kv_cache import KVCache, cache_dtype, kv_bytes_per_token, memory_of
from batchllm.runner.load_model import load_model
from batchllm.runner.loaded import LoadedRunner, usable_blocks
from batchllm.runner.nano_batches import NanoBatching, nano_batches_are_faster
from batchllm.runner.threads import Threads
from batchllm.runner.timed import TimedBackend, TimedOperations
from batchllm.sampling.flashinfer_draw import FlashInferDraw
from batchllm.sampling.sampler import Draw, draw_all_sorted
from batchllm.scheduler.batch import Batch
from batchllm.simulate.cost import CostModel
from batchllm.simulate.saved import this_machine
from batchllm.simulate.shape import shape_of

_KV_SHARE = 0.95  # of what the fullest steps leave; the rest is for gaps between what is in use
_TRIED_SIZE = 64  # of a row, to see whether FlashInfer runs
_GRAPHS_BYTES = 512 << 20  # the driver's, for the recordings of all sizes


def load_on_gpu(
    checkpoint: Checkpoint,
    config: EngineConfig,
    max_model_len: int,
    threads: Threads,
    clock: Clock | None,
    shard: Shard,
) -> LoadedRunner:
    """Load onto the current GPU, and record decode steps unless parts are timed."""
    device, recorder = CudaDevice(), CudaGraphs() if clock is None else None
    try:
        return load_on_device(
            checkpoint, config, max_model_len, threads, clock, device, recorder, shard
        )
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        raise UsageError(
            f"the model and its fullest steps do not fit the memory of {device}; free some, or "
            "make steps smaller with --max-num-batched-tokens and --max-num-seqs"
        ) from error


def load_on_device(
    checkpoint: Checkpoint,
    config: EngineConfig,
    max_model_len: int,
    threads: Threads,
    clock: Clock | None,
    device: Device,
    recorder: Recorder | None,
    shard: Shard = WHOLE,
) -> LoadedRunner:
    """Load the weights, run the fullest steps, and make KV of the memory that is left.

    Whether steps are faster in halves is tried last, with all of the KV.
    """
    shape, home = shard.config(checkpoint.config), device.torch_device
    limits = config.step_limits(home.type)
    name = choose_dtype(config, shape.dtype)
    dtype = getattr(torch, name)
    kv_dtype = cache_dtype(config.kv_cache_dtype) or dtype
    backend = _backend(config, shape, home.type, name)
    operations: Operations = DeviceOperations()
    draw: Draw = draw_all_sorted
    if (flashinfer := _flashinfer(backend, home)) is not None:  # whoever attends, it takes the rest
        operations = FlashInferOperations(operations, flashinfer)
        draw = FlashInferDraw(flashinfer)
    if clock is not None:
        clock.settle = device.synchronize
        backend, operations = TimedBackend(backend, clock), TimedOperations(operations, clock)
    model = load_model(
        checkpoint, config, max_model_len, backend, operations, dtype, home, kv_dtype, shard
    )
    kv_bytes = kv_bytes_per_token(shape.num_layers, shape.num_kv_heads, shape.head_dim, kv_dtype)
    overlap = None
    if config.overlap and clock is None and shard is WHOLE:
        overlap = _overlap(backend, Sizes(_heads(shape), config.block_size, kv_dtype), device)
    machine = this_machine(gpu=str(device)).with_overlap(overlap)
    costs = CostModel(machine, shape_of(shape, name, kv_bytes))
    nano_batching = _nano_batching(backend, device, costs)
    steps = FullestSteps.of(limits, max_model_len, config.block_size)
    cache = KVCache(
        num_layers=shape.num_layers,
        num_blocks=steps.num_blocks + 1,
        block_size=config.block_size,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=kv_dtype,
        allocate=memory_of(home),
    )
    runner = DeviceRunner(
        model,
        cache,
        backend,
        operations,
        device,
        block_size=config.block_size,
        max_num_seqs=limits.max_num_seqs,
        recorder=recorder,
        draw=draw,
        nano_batching=nano_batching,
    )
    recordings = isinstance(backend, GraphBackend) + (nano_batching is not None)
    needed = _bytes_for_steps(runner, steps, device, recordings)
    block_bytes = config.block_size * kv_bytes
    runner.resize(0)  # what they were tried with is room for KV, too
    free = device.free_memory() - needed - block_bytes
    wanted = min(
        num_kv_blocks(config.kv_memory_each, block_bytes, free, share=_KV_SHARE),
        usable_blocks(config, home.type, max_model_len),
    )
    wanted = shard.least(wanted)
    runner.resize(wanted)
    if nano_batching is not None and nano_batches_are_faster(
        runner.submit,
        nano_batching,
        device,
        limits.max_num_seqs,
        runner.num_blocks,
        config.block_size,
    ):
        nano_batching.pays = partial(_pays, costs)
    else:
        runner.run_whole()
        overlap = None
    return LoadedRunner(
        runner,
        runner.num_blocks,
        wanted,
        name,
        threads,
        backend.name,
        None,
        backend.granularity,
        home.type,
        str(device),
        kv_bytes_per_token=kv_bytes,
        overlap=overlap,
    )


def _backend(config: EngineConfig, shape: ModelConfig, device: str, dtype: str) -> AttentionBackend:
    if device != "cpu" and dtype != "bfloat16" and config.attention_backend != "reference":
        raise UsageError(f"dtype is {dtype}, but fast attention on a GPU computes in bfloat16")
    return make_backend(
        config.attention_backend,
        config.block_size,
        shape.head_dim,
        heads=_heads(shape),
        kv_dtype=cache_dtype(config.kv_cache_dtype),
        deterministic=config.deterministic,
        device=device,
    )


def _heads(shape: ModelConfig) -> Heads:
    return Heads(shape.num_heads, shape.num_kv_heads, shape.head_dim)


def _overlap(backend: AttentionBackend, sizes: Sizes, device: Device) -> tuple[float, float] | None:
    """Attention's share of the device beside products, and its speed, where it can have a share."""
    if not isinstance(backend, SharingBackend):
        return None
    return measure_share(backend, sizes, device.torch_device, gpu_seconds)


def _nano_batching(
    backend: AttentionBackend, device: Device, costs: CostModel
) -> NanoBatching | None:
    """What runs nano-batches, if the backend can share the device; it pays for nothing yet."""
    if not isinstance(backend, SharingBackend) or not costs.overlaps:
        return None
    half = backend.on_share(costs.machine.overlap_share)
    return NanoBatching(half, device.side_stream(), lambda batch: False)


def _pays(costs: CostModel, batch: Batch) -> bool:
    return costs.cost(batch).hidden > 0


def _flashinfer(backend: AttentionBackend, device: torch.device) -> Any:  # noqa: ANN401
    """FlashInfer, as the backend has it, or as it is installed and runs; else None."""
    if isinstance(backend, FlashInferBackend):
        return backend.flashinfer
    try:
        library = load_flashinfer()
        rows = torch.ones(1, _TRIED_SIZE, dtype=torch.bfloat16, device=device)
        library.rmsnorm(rows, rows[0])  # its kernels are compiled at first use, where they can be
    except (UsageError, RuntimeError, OSError):
        return None
    return library


def _bytes_for_steps(
    runner: DeviceRunner, steps: FullestSteps, device: Device, recordings: int
) -> int:
    """What steps take beyond weights and KV: the fullest, and beside it what recordings keep.

    Of each size there are so many recordings, which have all their memory but the driver's in
    common.
    """
    each = [
        device.peak_memory(partial(runner.execute, step))
        for step in (steps.prompts, steps.sampling, steps.decodes)
    ]
    return max(each) + (each[-1] if recordings else 0) + recordings * _GRAPHS_BYTES
