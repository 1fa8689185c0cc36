"""What it takes to admit the sequences at the head of the queue."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.scheduler.state import NOBODY, ChildCount, Segments

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Sequences in order of admission, and what each adds to those before it.

    `nodes` are those above them that no admitted sequence needs, and `first[i]` is the earliest
    candidate that needs `nodes[i]`; sorted by that, then from the top down. `tokens` [n] are what
    a candidate adds to the work: its own pending tokens and its first nodes' missing ones.
    """

    sequences: Ints
    nodes: Ints
    first: Ints
    tokens: Ints

    def take(self, count: int) -> "Candidates":
        """The first `count`."""
        nodes = int(np.searchsorted(self.first, count, side="left"))
        return Candidates(
            self.sequences[:count], self.nodes[:nodes], self.first[:nodes], self.tokens[:count]
        )

    def work(self, state: Segments) -> Ints:
        """Segments to compute, in order: a sequence's missing nodes, then itself."""
        missing = state.pending(self.nodes) > 0
        segments = np.concatenate([self.nodes[missing], self.sequences])
        turn = np.concatenate([self.first[missing], np.arange(len(self.sequences))])
        return segments[np.lexsort((segments, turn))]


def find_candidates(state: Segments, running: ChildCount, sequences: Ints, room: int) -> Candidates:
    """As many of `sequences`, in their order, as a step with `room` tokens has a use for.

    That is up to and including the one that fills it, and at least one.
    """
    own = state.pending(sequences)
    sequences = sequences[: int(np.searchsorted(np.cumsum(own), room, side="left")) + 1]
    own = own[: len(sequences)]
    nodes, first = _new_nodes(state, running, sequences)
    tokens = own + np.bincount(
        first, weights=state.pending(nodes), minlength=len(sequences)
    ).astype(np.int64)
    count = int(np.searchsorted(np.cumsum(tokens), room, side="left")) + 1
    return Candidates(sequences, nodes, first, tokens).take(min(count, len(sequences)))


def _new_nodes(state: Segments, running: ChildCount, sequences: Ints) -> tuple[Ints, Ints]:
    """Nodes above `sequences` below which none runs, and the first of them to need each."""
    parents = state.parent[sequences]
    first = np.arange(len(sequences))
    nodes, firsts = [], []
    while True:
        new = (parents != NOBODY) & (running.children[parents] == 0)  # [-1] is harmless
        if not new.any():
            break
        parents, place = np.unique(parents[new], return_index=True)
        first = first[new][place]  # the earliest, as `first` ascends until here
        by_turn = np.argsort(first, kind="stable")
        parents, first = parents[by_turn], first[by_turn]
        nodes.append(parents)
        firsts.append(first)
        parents = state.parent[parents]
    if not nodes:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    everything, turns = np.concatenate(nodes), np.concatenate(firsts)
    by_turn = np.lexsort((everything, turns))  # one node may be met from several depths
    everything, turns = everything[by_turn], turns[by_turn]
    _, place = np.unique(everything, return_index=True)
    place.sort()
    return everything[place], turns[place]
