"""One of several engines that answer a window together: a process around an `LLM`."""

from threading import Event

import numpy as np
from numpy.typing import NDArray

from batchllm.api import LLM
from batchllm.child import Parent, run_child
from batchllm.metrics import Metrics
from batchllm.prefix.plan import PrefixPlan
from batchllm.replica_messages import (
    Done,
    Finished,
    Inbox,
    InFlight,
    Kept,
    Note,
    Part,
    ReplicaLoaded,
    ReplicaSetup,
    Stepped,
)
from batchllm.request import RequestOutput
from batchllm.scheduler.batch import Batch
from batchllm.watch import Watch


class _Relay:
    """Tells the parent what it may show; it knows the window itself."""

    def __init__(self, parent: Parent) -> None:
        self._parent = parent

    def start_window(self, plan: PrefixPlan) -> None:
        pass

    def on_step(self, batch: Batch) -> None:
        self.add_tokens(batch.num_tokens * batch.num_steps)

    def add_tokens(self, count: int) -> None:
        self._parent.send(Stepped(count))

    def finish_rows(self, count: int) -> None:
        if count:
            self._parent.send(Finished(count))

    def note(self, text: str) -> None:
        self._parent.send(Note(text))


def work(parent: Parent) -> None:
    """Load the model, then answer what comes."""
    setup = parent.receive()
    assert isinstance(setup, ReplicaSetup), setup
    llm = LLM(setup.model.open(), setup.config)
    parent.send(ReplicaLoaded.of(llm.loaded))
    inbox = Inbox(parent)
    while True:
        _answer(llm, inbox.next(), inbox.stop, parent)


def _answer(llm: LLM, part: Part, stop: Event, parent: Parent) -> None:
    kept: set[int] = set()
    noted: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def keep(outputs: list[RequestOutput]) -> None:
        kept.update(output.row_index for output in outputs)
        parent.send(Kept(outputs))

    def note(rows: NDArray[np.int64]) -> None:
        nonlocal noted
        if not np.array_equal(rows, noted):
            noted = rows
            parent.send(InFlight(rows))

    llm.metrics = Metrics()
    llm.chosen_policies.clear()
    llm.run_at_most(part.max_num_seqs)
    watch = Watch(progress=_Relay(parent), keep=keep, should_stop=stop.is_set, before_step=note)
    outputs = llm.answer(part.requests(), watch=watch)
    rest = [output for output in outputs if output.row_index not in kept]
    parent.send(Done(rest, llm.metrics, llm.chosen_policies))


if __name__ == "__main__":
    run_child(work)
