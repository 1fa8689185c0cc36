"""The benchmarks' own bound, which knows nothing of batchllm, and the rest of the ladder."""

import importlib
import importlib.util
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"


def load_bound():
    # scripts/ is no package: the engines there run as plain files in other environments.
    path = SCRIPTS / "bench_engines" / "bound.py"
    spec = importlib.util.spec_from_file_location("bench_bound", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def load_ladder(name):
    """A module of scripts/, by its name as bench.py knows it."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))
