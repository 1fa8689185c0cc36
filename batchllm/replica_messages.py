"""What a replica and the process that divides the work among replicas say to each other."""

from dataclasses import dataclass, fields
from queue import SimpleQueue
from threading import Event, Thread

import numpy as np
from numpy.typing import NDArray

from batchllm.child import Parent
from batchllm.config import EngineConfig
from batchllm.metrics import Metrics
from batchllm.models.checkpoint import ModelSource
from batchllm.request import RaggedTokens, Request, RequestOutput, SamplingParams
from batchllm.runner.loaded import LoadedRunner
from batchllm.runner.threads import Threads

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ReplicaSetup:
    """To a replica: what it is to be."""

    model: ModelSource
    config: EngineConfig


@dataclass(frozen=True, slots=True)
class ReplicaLoaded:
    """From a replica: what it has loaded and runs on; as in `LoadedRunner`."""

    num_blocks: int
    wanted_blocks: int
    dtype: str
    threads: Threads
    attention: str
    slower: str | None
    granularity: int
    device: str
    hardware: str | None
    kv_bytes_per_token: int | None
    overlap: tuple[float, float] | None

    @classmethod
    def of(cls, loaded: "LoadedRunner | ReplicaLoaded") -> "ReplicaLoaded":
        """What there is to say of it."""
        return cls(**{f.name: getattr(loaded, f.name) for f in fields(cls)})


@dataclass(frozen=True, slots=True)
class Part:
    """To a replica: answer these requests, `max_num_seqs` at once; fields as in `PrefixPlan`."""

    tokens: RaggedTokens
    row_index: Rows
    params: list[SamplingParams]
    params_index: Rows
    max_num_seqs: int

    def requests(self) -> list[Request]:
        """The requests."""
        each = zip(self.row_index.tolist(), self.tokens, self.params_index.tolist(), strict=True)
        return [Request(row, tokens, self.params[params]) for row, tokens, params in each]


@dataclass(frozen=True, slots=True)
class Stop:
    """To a replica: let the step in progress be the last of this part."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """From a replica, before a step: the rows in it."""

    rows: Rows


@dataclass(frozen=True, slots=True)
class Stepped:
    """From a replica, after a step."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class Finished:
    """From a replica: so many rows are answered, or have failed."""

    num_rows: int


@dataclass(frozen=True, slots=True)
class Note:
    """From a replica: something to be shown."""

    text: str


@dataclass(frozen=True, slots=True)
class Kept:
    """From a replica: answers."""

    outputs: list[RequestOutput]


@dataclass(frozen=True, slots=True)
class Done:
    """From a replica: the part's answers that were not handed over yet, and what it took."""

    outputs: list[RequestOutput]
    metrics: Metrics
    policies: set[str]


class Inbox:
    """A replica's: parts in turn; `stop` is set while the last one that came is to be ended."""

    def __init__(self, parent: Parent) -> None:
        self.stop = Event()
        self._parts: SimpleQueue[Part] = SimpleQueue()
        Thread(target=self._read, args=(parent,), daemon=True).start()

    def next(self) -> Part:
        """The next part, when there is one."""
        return self._parts.get()

    def _read(self, parent: Parent) -> None:
        while True:
            match parent.receive():
                case Part() as part:
                    self.stop.clear()  # it was for the part before, which was done already
                    self._parts.put(part)
                case Stop():
                    self.stop.set()
