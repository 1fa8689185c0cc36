"""Run a language model over a table, computing every shared prompt prefix once.

Public names are loaded on first use: importing batchllm imports neither torch nor pyarrow.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchllm.api import LLM
    from batchllm.config import EngineConfig
    from batchllm.request import RequestOutput, SamplingParams
    from batchllm.text.prompts import PromptSpec

# How long OpenMP's threads spin for the next parallel region before they sleep, read when torch
# loads. The default is so long that where any other process wants a core, however low its priority,
# ours spend their time slices spinning and then wait for one: a run took over seven times as long.
# This is long enough for the gaps between a step's regions, and costs nothing on an idle machine.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__version__ = "0.1.0"

_HOMES = {
    "LLM": "batchllm.api",
    "EngineConfig": "batchllm.config",
    "PromptSpec": "batchllm.text.prompts",
    "RequestOutput": "batchllm.request",
    "SamplingParams": "batchllm.request",
}
__all__ = ["LLM", "EngineConfig", "PromptSpec", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'batchllm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
