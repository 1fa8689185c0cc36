"""How many threads compute: one a core that this process may use.

A product of matrices keeps a core's arithmetic busy with one thread, so a second hardware thread of
the same core gains nothing. A cgroup's CPU quota is time, not CPUs: with more threads than it pays
for, all are stopped for part of every period, and each step waits for the last of them. So quotas
are rounded down. CPU weights (a container's "request") are no limit and are not looked at.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from batchllm.cpus import Cpus, counted

# With these, OpenMP ties the main thread to a single CPU when torch is loaded: the process then
# seems to have no other.
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


@dataclass(frozen=True, slots=True)
class Threads:
    """How many threads compute, and what that was taken from."""

    count: int
    source: str
    warning: str | None = None

    def __str__(self) -> str:
        return f"{counted(self.count, 'thread')} ({self.source})"


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
        f"{counted(count, 'thread')}, but this process may use "
        f"{counted(cpus.at_once, 'CPU')} at once; --threads {cpus.best} fits",
    )
