"""The machine that was measured here, kept in the user's cache."""

import dataclasses
import json
from pathlib import Path

from batchllm.cpus import available_cpus
from batchllm.models.registered import default_cache_dir
from batchllm.native.kernels import usable_targets
from batchllm.simulate.machine import Machine, cpu_machine, gpu_machine


def this_machine(cache_dir: Path | None = None, *, gpu: str | None = None) -> Machine:
    """What `batchllm bench --calibrate` found here, or else what one like it can do.

    `gpu` is what its driver calls it, where a model runs on one.
    """
    built_in = _cpu() if gpu is None else gpu_machine(gpu)
    path = _path(cache_dir, built_in.name)
    try:
        fields = json.loads(path.read_text())
        fields["gemm_rates"] = tuple((int(n), float(r)) for n, r in fields["gemm_rates"])
        return Machine(**fields)
    except (OSError, ValueError, TypeError, KeyError):
        return built_in  # none was saved, or by another version


def save_machine(machine: Machine, cache_dir: Path | None = None) -> Path:
    """Keep a machine's figures; returns where."""
    path = _path(cache_dir, machine.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(machine), indent=1) + "\n")
    return path


def _cpu() -> Machine:
    return cpu_machine(next(iter(usable_targets()), None), available_cpus().best)


def _path(cache_dir: Path | None, name: str) -> Path:
    file = "machine.json" if name == "cpu" else f"machine-{name}.json"
    return (cache_dir or default_cache_dir()) / file
