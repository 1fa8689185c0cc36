"""How much memory the KV cache may take, and whether an error means that there is none."""

import errno
from pathlib import Path

import psutil

from batchllm.cgroup import PROC, cgroup_dirs, read_int, read_text
from batchllm.errors import UsageError

_SHARE = 0.5  # of what is free once the weights are loaded; the rest is for tables and activations
# It has no type for it that all of these have.
_TORCH_SAYS = ("can't allocate memory", "out of memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
# Beyond `memory.high` a cgroup is not killed but slowed down, until it has given memory back.
_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")  # the last is version 1


def free_memory(proc: Path = PROC) -> int:
    """Bytes this process can still take: what the machine has, or its cgroups' limits allow."""
    free = int(psutil.virtual_memory().available)
    for directory in cgroup_dirs("memory", proc):
        limits = [n for name in _LIMITS if (n := read_int(directory / name)) is not None]
        if limits:
            free = min(free, min(limits) - _used(directory))
    return max(free, 0)


def _used(cgroup: Path) -> int:
    """Bytes of a cgroup that cannot simply be dropped: its working set, as kubelet counts it.

    Files that were read once (a model's, say) stay cached and count as used until the room is
    wanted. Files in active use are reclaimed too, but then have to be read again: they stay in.
    """
    used = read_int(cgroup / "memory.current")
    if used is None:
        used = read_int(cgroup / "memory.usage_in_bytes") or 0
    lines = (read_text(cgroup / "memory.stat") or "").splitlines()
    stat = {name: int(value) for name, value in (line.split() for line in lines)}
    # Version 1 has the cgroup's own pages under the plain name, and all below it under `total_`.
    return used - stat.get("total_inactive_file", stat.get("inactive_file", 0))


def default_kv_memory(free: int) -> int:
    """Bytes of KV cache that a run takes if it is not told."""
    return int(free * _SHARE)


def num_kv_blocks(
    kv_memory: int | None, block_bytes: int, free: int, *, share: float = _SHARE
) -> int:
    """Blocks of `block_bytes` in `kv_memory` bytes; None takes a share of what is `free`.

    Raises:
        UsageError: not one block fits, or more is asked for than there is.
    """
    if kv_memory is not None and kv_memory > free:
        raise UsageError(
            f"kv memory of {kv_memory / 2**20:,.0f} MiB asked, {free / 2**20:,.0f} MiB are free; "
            f"ask for less, or leave --kv-memory out to take {share:.0%} of them"
        )
    budget = int(free * share) if kv_memory is None else kv_memory
    if budget < block_bytes:
        raise UsageError(
            f"kv memory of {budget:,} bytes does not hold one block of {block_bytes:,} bytes; "
            "give more with --kv-memory"
        )
    return budget // block_bytes


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: in Python or numpy, in torch, or a map of memory."""
    match error:
        case MemoryError():
            return True
        case OSError():
            return error.errno == errno.ENOMEM
        case RuntimeError():
            return any(sign in str(error) for sign in _TORCH_SAYS)
        case _:
            return False
