"""What a process may compute on: CPUs, the cores that these are on, and a share of their time."""

import os
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import psutil

from batchllm.cgroup import PROC, cgroup_dirs, read_int, read_text

_SYSFS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True)
class Cpus:
    """What this process may compute on: CPUs, the cores they are on, and a quota.

    `quota` is in CPUs, 2.5 for 250 ms of CPU time in every 100 ms; None is no limit.
    """

    num_cpus: int
    num_cores: int
    quota: float | None

    @property
    def at_once(self) -> int:
        """Threads that can run all the time."""
        return self.num_cpus if self.quota is None else min(self.num_cpus, self._whole_quota)

    @property
    def best(self) -> int:
        """Threads that a run takes if it is not told."""
        return self.num_cores if self.quota is None else min(self.num_cores, self._whole_quota)

    def __str__(self) -> str:
        if self.quota is not None and self.best < self.num_cores:
            return f"CPU quota of {self.quota:g}"
        cores = counted(self.num_cores, "core")
        return cores if self.num_cpus == self.num_cores else f"{cores}, {self.num_cpus} CPUs"

    @property
    def _whole_quota(self) -> int:
        assert self.quota is not None
        return max(int(self.quota), 1)


def available_cpus(
    proc: Path = PROC, sysfs: Path = _SYSFS, allowed: Set[int] | None = None
) -> Cpus:
    """What this process may compute on, by its affinity, the machine's cores and cgroup quotas."""
    if allowed is None and hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    if allowed is None:  # not Linux
        count = os.cpu_count() or 1
        return Cpus(count, psutil.cpu_count(logical=False) or count, None)
    siblings = {
        read_text(sysfs / f"cpu{n}" / "topology" / "thread_siblings_list") or str(n)
        for n in allowed
    }
    return Cpus(len(allowed), len(siblings), _cpu_quota(proc))


def _cpu_quota(proc: Path) -> float | None:
    """The least of all that hold, in CPUs."""
    quotas = []
    for directory in cgroup_dirs("cpu", proc):
        match (read_text(directory / "cpu.max") or "").split():  # version 2: `max 100000`
            case [quota, period] if quota.isdecimal() and period.isdecimal():
                quotas.append(int(quota) / int(period))
        quota_us = read_int(directory / "cpu.cfs_quota_us") or -1  # version 1: -1 is none
        period_us = read_int(directory / "cpu.cfs_period_us") or -1
        if min(quota_us, period_us) > 0:
            quotas.append(quota_us / period_us)
    return min(quotas, default=None)


def counted(count: int, what: str) -> str:
    """Like 1 core, 2 cores."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
