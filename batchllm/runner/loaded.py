"""What loading a checkpoint comes to."""

from dataclasses import dataclass

from batchllm.config import EngineConfig
from batchllm.runner.device_runner import DeviceRunner
from batchllm.runner.hash_runner import HashRunner
from batchllm.runner.threads import Threads
from batchllm.runner.torch_runner import TorchRunner


@dataclass(frozen=True, slots=True)
class LoadedRunner:
    """A runner ready for steps, with `num_blocks` of KV; `dtype` is what `auto` came to.

    `wanted_blocks` are more where the system did not give all the memory that was to be KV.

    Segments of KV must begin at multiples of `granularity`. `attention` names the backend; `slower`
    says why it is not the compiled one, where that was not the user's choice. `device` is `cpu` or
    `cuda`; `hardware` is the GPU's name, where the threads are not what computes.
    `kv_bytes_per_token` is given where it is not what the dtype makes it.
    """

    runner: TorchRunner | DeviceRunner | HashRunner
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

    def warnings(self, num_blocks: int) -> list[str]:
        """What is not as it could be, with `num_blocks` of KV at present."""
        found = [
            self.threads.warning,
            self.slower and f"much slower than need be: {self.slower}",
            num_blocks < self.wanted_blocks
            and f"the system gave {num_blocks / self.wanted_blocks:.0%} of what was to be KV "
            "memory; a limit may be set for the process (ulimit -v)",
        ]
        return [warning for warning in found if warning]


def usable_blocks(config: EngineConfig, device: str, max_model_len: int) -> int:
    """Blocks of KV that all sequences at their longest have: more can never be used."""
    return config.step_limits(device).max_num_seqs * -(-max_model_len // config.block_size)
