"""The model that a worker process holds: loaded once, whatever tasks come and go.

A worker's tasks may be threads of one process. They share the model, one window at a time: two runs
side by side would only halve each other's memory.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from batchllm.api import LLM
from batchllm.config import EngineConfig
from batchllm.integrations.call import GenerateCall
from batchllm.models.checkpoint import ModelSource


@dataclass(frozen=True, slots=True)
class Loaded:
    """Which load of a model answered: a host's process, and the number of its load there."""

    host: str
    process: int
    number: int


class ModelHolder:
    """Holds one model; a call for another one takes its place."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._made_of: tuple[ModelSource, EngineConfig] | None = None
        self._llm: LLM | None = None
        self._num_loads = 0

    @contextmanager
    def use(self, call: GenerateCall) -> Iterator[tuple[LLM, Loaded]]:
        """The call's model, for one user at a time.

        Raises:
            BatchLLMError: it cannot be loaded.
        """
        with self._lock:
            wanted = (call.model, call.config)
            if self._llm is None or self._made_of != wanted:
                self._drop()
                self._llm = LLM(call.model.open(), call.config)
                self._made_of = wanted
                self._num_loads += 1
            yield self._llm, Loaded(socket.gethostname(), os.getpid(), self._num_loads)

    def drop(self) -> None:
        """Give its memory back."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._llm is not None:
            self._llm.close()
            self._llm = self._made_of = None


HOLDER = ModelHolder()
"""This process's."""
