"""The benchmarks' own bound, which knows nothing of batchllm."""

import importlib.util
import sys
from pathlib import Path


def load_bound():
    # scripts/ is no package: the engines there run as plain files in other environments.
    path = Path(__file__).parents[1] / "scripts" / "bench_engines" / "bound.py"
    spec = importlib.util.spec_from_file_location("bench_bound", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
