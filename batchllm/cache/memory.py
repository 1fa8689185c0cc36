"""How much memory the KV cache may take."""

from pathlib import Path

import psutil

from batchllm.errors import UsageError

_SHARE = 0.5  # of what is free once the weights are loaded; the rest is for tables and activations
_UNLIMITED = 1 << 60


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process can still take: what the machine has, or its container's limit allows."""
    free = int(psutil.virtual_memory().available)
    limits = (
        ("memory.max", "memory.current"),  # cgroup v2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # v1
    )
    for limit_name, used_name in limits:
        try:
            limit = (cgroup / limit_name).read_text().strip()
            used = int((cgroup / used_name).read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit() and int(limit) < _UNLIMITED:
            free = min(free, int(limit) - used)
    return max(free, 0)


def default_kv_memory(free: int) -> int:
    """Bytes of KV cache that a run takes if it is not told."""
    return int(free * _SHARE)


def num_kv_blocks(kv_memory: int | None, block_bytes: int, free: int) -> int:
    """Blocks of `block_bytes` in `kv_memory` bytes; None takes half of what is `free`.

    Raises:
        UsageError: not one block fits, or more is asked for than there is.
    """
    if kv_memory is not None and kv_memory > free:
        raise UsageError(
            f"kv memory of {kv_memory / 2**20:,.0f} MiB asked, {free / 2**20:,.0f} MiB are free"
        )
    budget = default_kv_memory(free) if kv_memory is None else kv_memory
    if budget < block_bytes:
        raise UsageError(
            f"kv memory of {budget:,} bytes does not hold one block of {block_bytes:,} bytes; "
            "give more with --kv-memory"
        )
    return budget // block_bytes
