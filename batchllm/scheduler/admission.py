"""Who is admitted, and until when everyone is expected to run."""

import numpy as np
from numpy.typing import NDArray

from batchllm.scheduler.candidates import Candidates, find_candidates, nodes_alone
from batchllm.scheduler.idle import IdleNodes
from batchllm.scheduler.lengths import Expectation, LengthEstimator
from batchllm.scheduler.projection import Projection
from batchllm.scheduler.queue import AdmissionQueue
from batchllm.scheduler.running import Running
from batchllm.scheduler.state import Segments
from batchllm.scheduler.timeline import first_sample_step

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Admission:
    """Admits from the queue's head as long as a step has a use for it and memory fits.

    Memory fits if the blocks that all admitted sequences will hold, projected to each one's
    expected end, stay within the pool, with something to spare where lengths are not known.
    """

    def __init__(
        self,
        state: Segments,
        queue: AdmissionQueue,
        running: Running,
        idle: IdleNodes,
        projection: Projection,
        lengths: LengthEstimator,
        *,
        num_blocks: int,
        block_size: int,
        step_tokens: int,
        max_num_seqs: int,
    ) -> None:
        self._state = state
        self._queue = queue
        self._running = running
        self._idle = idle
        self._projection = projection
        self._lengths = lengths
        self._num_blocks = num_blocks
        self._block_size = block_size
        self.step_tokens = step_tokens
        self._max_num_seqs = max_num_seqs
        self._deviation: Floats = np.zeros(state.count)  # of the expected lengths
        self._all_known = True  # no deviation yet
        self._is_tight = False  # not all fitted that a step had a use for, last time
        self.is_open = True  # something changed since the queue's head did not fit

    def admit(self, room: int) -> None:
        """Admit for a step that has `room` tokens left."""
        while room > 0 and self.is_open and len(self._queue):
            places = self._max_num_seqs - len(self._running)
            if places <= 0:
                return
            if self._is_tight and self._head_cannot_fit(room):
                self.is_open = False
                return
            candidates = find_candidates(
                self._state, self._running.below, self._queue, min(places, room), room
            )
            start, expected = self._expect(candidates, room)
            finish = start + expected.tokens - 1
            spare = self._spare(expected.deviation)
            count = self._projection.how_many_fit(
                candidates, start, finish, spare, self._num_blocks
            )
            self._is_tight = count < len(candidates.sequences)
            if self._is_tight:
                self.is_open = False
            if count == 0 and len(self._running) == 0:
                count = 1  # the head alone fits the pool, whatever lies idle in it
            if count:
                admitted = candidates.take(count)
                self._note_deviation(admitted.sequences, expected.deviation[:count])
                self._start(admitted, start[:count], finish[:count])
                room -= int(admitted.tokens.sum())

    def _head_cannot_fit(self, room: int) -> bool:
        """A quick look at the head alone: mostly, when one has finished, the next does not fit yet.

        It finds what `how_many_fit` would, for the price of a few numbers; if it finds nothing,
        that means nothing.
        """
        if len(self._running) == 0:
            return False
        head, state = self._queue.peek(1), self._state
        sequence = int(head[0])
        nodes = nodes_alone(state, self._running.below, sequence)
        tokens = int(state.pending(head)[0])
        tokens += sum(int(state.length[node] - state.num_computed[node]) for node in nodes)
        if state.ignore_eos[sequence]:
            expected = max(int(state.max_tokens[sequence] - state.num_outputs[sequence]), 1)
        else:
            expected = int(self._remaining(head).tokens[0])
        return self._projection.cannot_fit(
            sequence, expected, nodes, self._num_blocks, grows=tokens <= room
        )

    def revise_overdue(self) -> None:
        """Expect more of decodes that should have finished by now."""
        decodes = self._running.decoding
        overdue = self._projection.finish[decodes] < self._projection.now
        if overdue.any():
            self.revise(decodes[overdue])

    def revise(self, sequences: Ints) -> None:
        """Expect of decodes what their next token in the coming step suggests."""
        if len(sequences):
            now = np.full(len(sequences), self._projection.now)
            expected = self._remaining(sequences)
            self._note_deviation(sequences, expected.deviation)
            self._projection.revise(sequences, now, now + expected.tokens - 1)

    def _expect(self, candidates: Candidates, room: int) -> tuple[Ints, Expectation]:
        """In which step each candidate samples first, and how many tokens from then on."""
        now = self._projection.now
        start = np.full(len(candidates.sequences), now)
        remaining = self._remaining(candidates.sequences)
        over = int(candidates.tokens.sum()) - room
        if over <= 0:
            return start, remaining
        # The last one takes more than this step. The next will do even if nobody finishes before?
        budget = self.step_tokens
        if over <= budget - (len(self._running) + len(start) - 1):
            start[-1] = now + 1
        else:
            others = self._projection.finish[self._running.sequences()]
            finishes = np.concatenate([others, (start + remaining.tokens - 1)[:-1]])
            start[-1] = first_sample_step(over, finishes, budget, now)
        return start, remaining

    def _spare(self, deviation: Floats) -> Floats:
        """Blocks to leave free with the first 1, 2, … candidates, [n].

        The lengths of many answers add up to about their expectation, give or take the root of
        their summed variances: twice that is left free, so that a preemption is the exception.
        """
        if self._all_known and not deviation.any():
            return np.zeros(len(deviation))
        running = self._deviation[self._running.sequences()]
        variance = np.cumsum(deviation**2) + (running**2).sum()
        spare: Floats = 2 * np.sqrt(variance) / self._block_size
        return spare

    def _start(self, admitted: Candidates, start: Ints, finish: Ints) -> None:
        self._queue.pop(len(admitted.sequences))
        self._projection.admit(admitted.sequences, start, finish, admitted.nodes)
        self._idle.remove(self._running.admit(admitted))

    def _remaining(self, sequences: Ints) -> Expectation:
        state = self._state
        return self._lengths.remaining(
            state.num_outputs[sequences], state.max_tokens[sequences], state.ignore_eos[sequences]
        )

    def _note_deviation(self, sequences: Ints, deviation: Floats) -> None:
        self._deviation[sequences] = deviation
        self._all_known = self._all_known and not deviation.any()
