"""From an opened checkpoint to a runner and its block pool, on whatever device.

Imports torch when a model is loaded: that takes seconds, and what can be refused is refused before.
"""

from batchllm.config import EngineConfig
from batchllm.cpus import available_cpus
from batchllm.errors import UsageError
from batchllm.models.checkpoint import Checkpoint
from batchllm.models.fake_checkpoint import FAKE_MODEL, FakeCheckpoint
from batchllm.models.parallel import WHOLE, Shard
from batchllm.runner.choose_device import choose_device
from batchllm.runner.clock import Clock
from batchllm.runner.load_fake import load_fake
from batchllm.runner.loaded import LoadedRunner
from batchllm.runner.threads import choose_threads


def load_runner(
    checkpoint: Checkpoint,
    config: EngineConfig,
    max_model_len: int,
    clock: Clock | None = None,
) -> LoadedRunner:
    """Load a model, in as many processes as are to share it. A clock is for measuring.

    Raises:
        ModelError: the weights cannot be read.
        UsageError: an option does not suit the model or the machine.
        WorkerError: another process failed.
    """
    if config.tensor_parallel_size == 1:
        return load_shard(checkpoint, config, max_model_len, clock)
    if clock is not None:
        raise UsageError("only a model in one process can be measured part by part")
    from batchllm.runner.tensor_parallel import load_in_processes

    return load_in_processes(checkpoint, config, max_model_len)


def load_shard(
    checkpoint: Checkpoint,
    config: EngineConfig,
    max_model_len: int,
    clock: Clock | None = None,
    shard: Shard = WHOLE,
) -> LoadedRunner:
    """Load what this process has of a model.

    The number of threads is torch's, so it holds for the whole process.
    """
    cpus = available_cpus()
    if isinstance(checkpoint, FakeCheckpoint):
        if clock is not None:
            raise UsageError(f"model {FAKE_MODEL!r} has nothing to measure")
        threads = choose_threads(config.threads, cpus, openmp_threads=cpus.best)
        return load_fake(checkpoint, config, max_model_len, threads)
    import torch

    threads = choose_threads(config.threads, cpus, openmp_threads=torch.get_num_threads())
    torch.set_num_threads(max(threads.count // config.num_processes, 1))
    if choose_device(config.device) == "cuda":
        from batchllm.runner.load_device import load_on_gpu as load
    else:
        from batchllm.runner.load_cpu import load_on_cpu as load
    return load(checkpoint, config, max_model_len, threads, clock, shard)
