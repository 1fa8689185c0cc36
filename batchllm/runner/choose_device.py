"""What a model runs on. Imports no torch where there can be no GPU: a job's identity asks, too."""

from pathlib import Path

from batchllm.errors import UsageError

# What a GPU's driver shows: Linux, and Linux inside Windows.
_SIGNS = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"), Path("/dev/dxg"))


def choose_device(asked: str, signs: tuple[Path, ...] = _SIGNS) -> str:
    """`cpu` or `cuda`; `auto` is `cuda` where torch can use a GPU.

    Raises:
        UsageError: a GPU is asked for and there is none that torch can use.
    """
    if asked == "cpu" or (asked == "auto" and not any(sign.exists() for sign in signs)):
        return "cpu"
    if _torch_has_cuda():
        return "cuda"
    if asked == "auto":
        return "cpu"
    raise UsageError(
        "device is cuda, but torch can use no GPU: there is none, its driver is missing, or torch "
        "was installed without CUDA; leave --device out to run on the CPU"
    )


def check_gpus(device: str, count: int) -> None:
    """See that there are as many GPUs as processes that are to have one each.

    Raises:
        UsageError: there are fewer.
    """
    if device != "cuda":
        return
    import torch

    if (found := torch.cuda.device_count()) < count:
        raise UsageError(
            f"{count} processes need a GPU each, but torch can use {found}; see "
            "--tensor-parallel-size and --data-parallel-size"
        )


def _torch_has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
