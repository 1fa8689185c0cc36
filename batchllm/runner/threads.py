"""How many threads compute: one a core that this process may use.

A product of matrices keeps a core's arithmetic busy with one thread, so a second hardware thread of
the same core gains nothing. A cgroup's CPU quota is time, not CPUs: with more threads than it pays
for, all are stopped for part of every period, and each step waits for the last of them. So quotas
are rounded down. CPU weights (a container's "request") are no limit and are not looked at.
"""

import os
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import psutil

from batchllm.cgroup import PROC, cgroup_dirs, read_int, read_text

_SYSFS = Path("/sys/devices/system/cpu")
# With these, OpenMP ties the main thread to a single CPU when torch is loaded: the process then
# seems to have no other.
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


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
        cores = _counted(self.num_cores, "core")
        return cores if self.num_cpus == self.num_cores else f"{cores}, {self.num_cpus} CPUs"

    @property
    def _whole_quota(self) -> int:
        assert self.quota is not None
        return max(int(self.quota), 1)


@dataclass(frozen=True, slots=True)
class Threads:
    """How many threads compute, and what that was taken from."""

    count: int
    source: str
    warning: str | None = None

    def __str__(self) -> str:
        return f"{_counted(self.count, 'thread')} ({self.source})"


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


def choose_threads(
    asked: int | None,
    cpus: Cpus,
    *,
    openmp_threads: int,
    environ: Mapping[str, str] = os.environ,
) -> Threads:
    """As many as asked for, by an option or by OMP_NUM_THREADS, or else one a core.

    `openmp_threads` is how many OpenMP would take by itself; where it ties threads to CPUs, it
    alone knows how many it has.
    """
    if any(environ.get(name, "false").lower() != "false" for name in _BINDING):
        cpus = Cpus(openmp_threads, openmp_threads, cpus.quota)
    first = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # the rest is nested regions
    if asked is not None:
        count, source = asked, "as asked"
    elif first.isdecimal() and int(first) > 0:
        count, source = int(first), "OMP_NUM_THREADS"
    else:
        count, source = cpus.best, str(cpus)
    if count <= cpus.at_once:
        return Threads(count, source)
    return Threads(
        count,
        source,
        f"{_counted(count, 'thread')}, but this process may use "
        f"{_counted(cpus.at_once, 'CPU')} at once; --threads {cpus.best} fits",
    )


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


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
