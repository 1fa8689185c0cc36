"""What loading a checkpoint comes to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from batchllm.cache.memory import free_memory, num_kv_blocks
from batchllm.config import EngineConfig
from batchllm.runner.threads import Threads
from batchllm.scheduler.batch import Batch, StepOutput


class StepRunner(Protocol):
    """Runs steps over a KV cache; see also `AheadRunner` (engine.py)."""

    def execute(self, batch: Batch) -> StepOutput:
        """Run one step."""
        ...

    def shrink(self, num_blocks: int) -> int:
        """Go on with `num_blocks` of KV, or as many as there are; all that is held is lost."""
        ...


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class LoadedRunner:
    """A runner ready for steps, with `num_blocks` of KV; `dtype` is what `auto` came to.

    `wanted_blocks` are more where the system did not give all the memory that was to be KV.

    Segments of KV must begin at multiples of `granularity`. `attention` names the backend; `slower`
    says why it is not the compiled one, where that was not the user's choice. `device` is `cpu` or
    `cuda`; `hardware` is the GPU's name, where the threads are not what computes.
    `kv_bytes_per_token` is given where it is not what the dtype makes it. `threads` are those of
    all processes that share the machine, and `close` ends those that belong to the runner.
    `overlap`: where steps may run in halves, attention of one beside products of the other, its
    share of the device and its speed with it, see `Machine`.
    """

    runner: StepRunner
    num_blocks: int
    wanted_blocks: int
    dtype: str
    threads: Threads
    attention: str
    slower: str | None
    granularity: int = 1
    device: str = "cpu"
    hardware: str | None = None
    kv_bytes_per_token: int | None = None
    overlap: tuple[float, float] | None = None
    close: Callable[[], object] = _nothing


def usable_blocks(config: EngineConfig, device: str, max_model_len: int) -> int:
    """Blocks of KV that all sequences at their longest have: more can never be used."""
    return config.step_limits(device).max_num_seqs * -(-max_model_len // config.block_size)


def affordable_blocks(config: EngineConfig, kv_bytes_per_token: int, max_model_len: int) -> int:
    """Blocks of KV that the machine's memory has room for now, and that can be used.

    Raises:
        UsageError: not one block fits, or more is asked for than there is.
    """
    free = free_memory() // config.num_processes
    num_blocks = num_kv_blocks(config.kv_memory_each, config.block_size * kv_bytes_per_token, free)
    return min(num_blocks, usable_blocks(config, "cpu", max_model_len))
