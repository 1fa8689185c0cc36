"""Work of the device that is recorded once and then given to it in one go."""

from collections.abc import Callable
from typing import Protocol

import torch

Replay = Callable[[], None]


class Recorder(Protocol):
    """Records what a call gives the device to do."""

    def record(self, call: Callable[[], None]) -> Replay:
        """Record a call, without the device's doing it, and return what repeats it.

        What is repeated are the operations and the addresses, so whatever may change must lie in
        memory that stays where it is. What the call allocates is overwritten by others' replays.
        The call was run before: what is loaded or tuned at its first run must not be recorded.
        """
        ...

    def forget(self) -> None:
        """Nothing recorded will be replayed any more."""
        ...


class CudaGraphs:
    """CUDA graphs that share their memory, since only one runs at a time.

    See torch's notes on "CUDA semantics", "Sharing memory across captures": replaying in any order
    is safe as nothing that one of them allocates is read after it.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], None]) -> Replay:
        """See `Recorder.record`."""
        graph = torch.cuda.CUDAGraph()
        # The other threads of the process (a journal's, a progress bar's) do as they like.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            call()
        return graph.replay

    def forget(self) -> None:
        """See `Recorder.forget`. Memory that no graph holds any more cannot be gone on with."""
        self._pool = torch.cuda.graph_pool_handle()
