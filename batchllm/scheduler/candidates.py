"""The sequences at the head of the queue, and what it takes to admit them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.scheduler.queue import AdmissionQueue
from batchllm.scheduler.state import NOBODY, ChildCount, Segments

Ints = NDArray[np.int64]
_NONE: Ints = np.zeros(0, dtype=np.int64)
_GLANCE = 32  # sequences looked at first: mostly a step has no use for more


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
        if count == len(self.sequences):
            return self
        nodes = int(np.searchsorted(self.first, count, side="left"))
        return Candidates(
            self.sequences[:count], self.nodes[:nodes], self.first[:nodes], self.tokens[:count]
        )

    def by_first(self, amounts: Ints) -> Ints:
        """Amounts of the nodes [num_nodes], added up for the first candidate of each, [n]."""
        return _by_first(self.first, amounts, len(self.sequences))

    def work(self, state: Segments) -> Ints:
        """Segments to compute, in order: a sequence's missing nodes, then itself."""
        if len(self.nodes) == 0:
            return self.sequences
        missing = state.pending(self.nodes) > 0
        segments = np.concatenate([self.nodes[missing], self.sequences])
        turn = np.concatenate([self.first[missing], np.arange(len(self.sequences))])
        return segments[np.lexsort((segments, turn))]


def find_candidates(
    state: Segments, running: ChildCount, queue: AdmissionQueue, most: int, room: int
) -> Candidates:
    """As many of the queue's first `most` sequences as a step with `room` tokens has a use for.

    That is up to and including the one that fills it, and at least one.
    """
    glance = _GLANCE
    while True:
        sequences = queue.peek(min(glance, most))
        own = state.pending(sequences)
        total = own.cumsum()
        if total[-1] >= room or len(sequences) < glance:
            break
        glance *= 4
    count = int(total.searchsorted(room, side="left")) + 1
    sequences, own = sequences[:count], own[:count]
    nodes, first = _new_nodes(state, running, sequences)
    if len(nodes) == 0:
        return Candidates(sequences, nodes, first, own)
    tokens = own + _by_first(first, state.pending(nodes), len(sequences))
    count = int(tokens.cumsum().searchsorted(room, side="left")) + 1
    return Candidates(sequences, nodes, first, tokens).take(min(count, len(sequences)))


def nodes_alone(state: Segments, running: ChildCount, sequence: int) -> list[int]:
    """Nodes above one sequence below which none runs."""
    nodes, node = [], int(state.parent[sequence])
    while node != NOBODY and running.children[node] == 0:
        nodes.append(node)
        node = int(state.parent[node])
    return nodes


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
        return _NONE, _NONE
    if len(nodes) == 1:
        return nodes[0], firsts[0]
    everything, turns = np.concatenate(nodes), np.concatenate(firsts)
    by_turn = np.lexsort((everything, turns))  # one node may be met from several depths
    everything, turns = everything[by_turn], turns[by_turn]
    _, place = np.unique(everything, return_index=True)
    place.sort()
    return everything[place], turns[place]


def _by_first(first: Ints, amounts: Ints, count: int) -> Ints:
    if len(amounts) == 0:
        return np.zeros(count, dtype=np.int64)
    return np.bincount(first, weights=amounts, minlength=count).astype(np.int64)
