"""The machine that was measured here, kept in the user's cache."""

import dataclasses
import json
from pathlib import Path

from batchllm.models.registered import default_cache_dir
from batchllm.simulate.machine import MACHINES, Machine

_NAME = "machine.json"


def this_machine(cache_dir: Path | None = None) -> Machine:
    """What `batchllm bench --calibrate` found here, or else the built-in CPU."""
    path = (cache_dir or default_cache_dir()) / _NAME
    try:
        fields = json.loads(path.read_text())
        fields["gemm_rates"] = tuple((int(n), float(r)) for n, r in fields["gemm_rates"])
        return Machine(**fields)
    except (OSError, ValueError, TypeError, KeyError):
        return MACHINES["cpu"]  # none was saved, or by another version


def save_machine(machine: Machine, cache_dir: Path | None = None) -> Path:
    """Keep a machine's figures; returns where."""
    path = (cache_dir or default_cache_dir()) / _NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(machine), indent=1) + "\n")
    return path
