"""KV memory, projected to the end of every sequence that is admitted."""

import numpy as np
from numpy.typing import NDArray

from batchllm.scheduler.candidates import Candidates
from batchllm.scheduler.fitting import Demand, how_many_fit
from batchllm.scheduler.state import NOBODY, ChildCount, Segments
from batchllm.scheduler.timeline import Events, Timeline, sequence_events

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_ABSENT, _FOREVER, _UNTIL = 0, 1, 2
_NEVER = -1


class Projection:
    """The blocks that admitted sequences, and the nodes above them, will hold in every coming step.

    A sequence grows by a token a step until it is expected to finish. A node is held until the last
    sequence below it finishes; while one of those still waits, nobody knows when that is, and
    the node counts in every step to come. Exact where the lengths are known, but that a prompt and
    its nodes count whole from admission on though they may still be filling.

    Steps are absolute; `now` is the one to be scheduled next.
    """

    def __init__(self, segments: Segments, block_size: int) -> None:
        self._segments = segments
        self._block_size = block_size
        self._timeline = Timeline()
        self._forever = 0
        self.latest_start = _NEVER  # of any sequence so far
        # Of sequences: first step in which one samples, expected last, tokens held at first.
        self.start: Ints = np.full(segments.count, _NEVER, dtype=np.int64)
        self.finish: Ints = np.full(segments.count, _NEVER, dtype=np.int64)  # of nodes: the latest
        self._private: Ints = np.zeros(segments.count, dtype=np.int64)
        self._node = np.full(segments.count, _ABSENT, dtype=np.int8)
        self._blocks: Ints = -(-segments.length // block_size)
        self._waiting = ChildCount(segments.parent, segments.of_leaf)

    @property
    def now(self) -> int:
        return self._timeline.now

    def advance(self, num_steps: int) -> None:
        """Let steps pass."""
        self._timeline.advance(num_steps)

    def how_many_fit(
        self, candidates: Candidates, start: Ints, finish: Ints, spare: Floats, num_blocks: int
    ) -> int:
        """The most candidates, from the first on, that can be admitted; see `how_many_fit`.

        Their nodes count forever here, also where no other sequence below them waits.
        """
        lasting = candidates.by_first(self._blocks[candidates.nodes])
        private = self._tokens(candidates.sequences)
        demand = Demand(private, start, finish, lasting, self._block_size)
        left = num_blocks - self._forever
        return how_many_fit(self._timeline.ahead(), self.now, demand, spare, left)

    def cannot_fit(
        self, sequence: int, expected: int, nodes: list[int], num_blocks: int, *, grows: bool
    ) -> bool:
        """Whether a sequence overfills the step that is fullest without it.

        So it surely cannot be admitted, without looking at any other step. It will sample
        `expected` tokens, from this step on if it `grows` now, and needs `nodes` that nobody else
        does.
        """
        step, held = self._timeline.fullest()
        later = step - self.now
        if later >= expected:
            return False
        segments = self._segments
        tokens = int(segments.length[sequence] + segments.num_outputs[sequence])
        blocks = -(-(tokens + (later if grows else 0)) // self._block_size)
        blocks += sum(int(self._blocks[node]) for node in nodes)
        return held + self._forever + blocks > num_blocks

    def admit(self, sequences: Ints, start: Ints, finish: Ints, nodes: Ints) -> None:
        """Count `sequences`, and `nodes` that no admitted sequence needed before."""
        if len(nodes):
            self._node[nodes] = _FOREVER
            self._forever += int(self._blocks[nodes].sum())
        self._hold(sequences, start, finish)
        self.give_up(sequences)

    def revise(self, sequences: Ints, start: Ints, finish: Ints) -> None:
        """Expect something else of admitted sequences, from what they hold now."""
        self._let_go(sequences)
        self._hold(sequences, start, finish)

    def remove(self, sequences: Ints) -> None:
        """Sequences are through and hold nothing any more."""
        self._let_go(sequences)

    def preempt(self, sequences: Ints) -> None:
        """Sequences hold nothing any more and wait again."""
        self._let_go(sequences)
        unknown = self._waiting.add(sequences)
        unknown = unknown[self._node[unknown] == _UNTIL]
        self._hold_nodes(unknown, -self._blocks[unknown])
        self._node[unknown] = _FOREVER
        self._forever += int(self._blocks[unknown].sum())

    def drop_nodes(self, nodes: Ints) -> None:
        """No admitted sequence needs the nodes any more."""
        self._forever -= int(self._blocks[nodes[self._node[nodes] == _FOREVER]].sum())
        until = nodes[self._node[nodes] == _UNTIL]
        self._hold_nodes(until, -self._blocks[until])
        self._node[nodes] = _ABSENT
        self.finish[nodes] = _NEVER

    def give_up(self, sequences: Ints) -> None:
        """Sequences wait no longer to be admitted: they are, or never will be."""
        known = self._waiting.remove(sequences)
        known = known[self._node[known] == _FOREVER]
        if len(known):
            self._node[known] = _UNTIL
            self._forever -= int(self._blocks[known].sum())
            self._hold_nodes(known, self._blocks[known])

    def check(self, sequences: Ints, nodes: Ints, waiting: Ints) -> None:
        """Assert that what is projected is what these admitted segments add up to (for tests).

        `waiting` are the sequences that may still be admitted.
        """
        parents = ChildCount(self._segments.parent, waiting).children
        assert np.array_equal(self._waiting.children, parents)
        assert np.array_equal(np.flatnonzero(self._node), nodes)
        assert np.array_equal(self._node[nodes] == _FOREVER, parents[nodes] > 0)
        last = self.finish[sequences].max(initial=self.now)
        size = self._block_size
        for step in range(self.now, int(last) + 2):
            held = self._forever
            for s in sequences[self.finish[sequences] >= step].tolist():
                grown = max(0, step - int(self.start[s]))
                held += -(-(int(self._private[s]) + grown) // size)
            until = (self._node == _UNTIL) & (self.finish >= step)
            held += int(self._blocks[until].sum())
            assert self._timeline.held_in(step) + self._forever == held, f"step {step}"

    def _tokens(self, sequences: Ints) -> Ints:
        return self._segments.length[sequences] + self._segments.num_outputs[sequences]

    def _hold(self, sequences: Ints, start: Ints, finish: Ints) -> None:
        self._private[sequences] = self._tokens(sequences)
        self.start[sequences] = start
        self.finish[sequences] = finish
        self.latest_start = max(self.latest_start, int(start.max()))
        self._apply(self._events(sequences), 1)
        self._raise(sequences)

    def _let_go(self, sequences: Ints) -> None:
        sequences = sequences[self.finish[sequences] >= self.now]  # the others are through anyway
        if len(sequences):
            self._apply(self._events(sequences), -1)

    def _events(self, sequences: Ints) -> Events:
        private = self._private[sequences]
        later = sequence_events(
            private, self.start[sequences], self.finish[sequences], self._block_size
        )
        first = -(-private // self._block_size)
        return Events(
            np.concatenate([[self.now], later.steps]),
            np.concatenate([[first.sum()], later.amounts]),
        )

    def _apply(self, events: Events, sign: int) -> None:
        self._timeline.add(events.steps, sign * events.amounts)

    def _hold_nodes(self, nodes: Ints, blocks: Ints) -> None:
        """Hold `blocks` more from now until each node's latest finish, if that is to come."""
        coming = self.finish[nodes] >= self.now
        nodes, blocks = nodes[coming], blocks[coming]
        self._timeline.add(np.full(len(nodes), self.now), blocks)
        self._timeline.add(self.finish[nodes] + 1, -blocks)

    def _raise(self, sequences: Ints) -> None:
        """Let the nodes above last as long as `sequences` do."""
        finish_of, parent_of = self.finish.data, self._segments.parent.data
        before: dict[int, int] = {}  # of the nodes that are raised
        for sequence in sequences.tolist():
            last, node = finish_of[sequence], parent_of[sequence]
            while node != NOBODY and finish_of[node] < last:
                before.setdefault(node, finish_of[node])
                finish_of[node] = last
                node = parent_of[node]
        until = [node for node in before if self._node[node] == _UNTIL]
        if until:
            nodes = np.array(until)
            ended = np.array([before[node] for node in until])
            blocks = self._blocks[nodes]
            # Not freed then, but later; what was freed already is held again.
            self._timeline.add(ended + 1, blocks)
            self._timeline.add(self.finish[nodes] + 1, -blocks)
