"""The runner of `fake`."""

from batchllm.config import EngineConfig
from batchllm.models.fake_checkpoint import FakeCheckpoint
from batchllm.runner.hash_runner import HashRunner
from batchllm.runner.loaded import LoadedRunner, affordable_blocks
from batchllm.runner.threads import Threads
from batchllm.simulate.shape import shape_of


def load_fake(
    checkpoint: FakeCheckpoint, config: EngineConfig, max_model_len: int, threads: Threads
) -> LoadedRunner:
    """A runner of hashes, with as much KV as a model of its sizes would have."""
    dtype = checkpoint.config.dtype
    kv_bytes = int(shape_of(checkpoint.config, dtype).kv_bytes_per_token)
    num_blocks = affordable_blocks(config, kv_bytes, max_model_len)
    runner = HashRunner(num_blocks, config.block_size, max_model_len, checkpoint.answer_token_ids)
    return LoadedRunner(runner, num_blocks, num_blocks, dtype, threads, "none", None)
