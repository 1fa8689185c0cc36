"""Run a language model over a table, computing every shared prompt prefix once.

Public names are loaded on first use: importing batchllm imports neither torch nor pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchllm.api import LLM
    from batchllm.config import EngineConfig
    from batchllm.request import RequestOutput, SamplingParams
    from batchllm.text.prompts import PromptSpec

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
