"""What the step that runs will sample: not known yet, but counted on."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from batchllm.scheduler.batch import Batch, Carried, Samples, StepOutput

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Expected:
    """A batch's samples, as long as nobody knows their tokens.

    Idea: a token is expected to be no end, so the sequence goes on in the next batch, which carries
    the token in. A sequence whose answer is then as long as it may be ends, whatever the token is.
    Where a token turns out to be an end, the next batch has computed one token in vain.

    `sequences[i]` gets its output number `num_outputs[i]` (1 for the first) from sample `place[i]`
    of `samples`, and `is_last[i]` if that makes it as long as it may be; all [n]. The samples that
    no place names are those of sequences that turned out to have ended before.
    """

    samples: Samples
    place: Ints
    sequences: Ints
    num_outputs: Ints
    is_last: NDArray[np.bool_]

    @classmethod
    def of(cls, batch: Batch, has_ended: NDArray[np.bool_], max_tokens: Ints) -> "Expected":
        """What `batch` is to sample; `has_ended` and `max_tokens` by sequence."""
        assert batch.num_steps == 1, "nobody is ahead of a simulation"
        place = np.flatnonzero(~has_ended[batch.samples.sequence])
        sequences = batch.samples.sequence[place]
        num_outputs = batch.samples.output_position[place] + 1
        return cls(
            batch.samples, place, sequences, num_outputs, num_outputs >= max_tokens[sequences]
        )

    @property
    def num_in_vain(self) -> int:
        """Samples of sequences that had ended."""
        return len(self.samples) - len(self.place)

    def tokens(self, output: StepOutput) -> StepOutput:
        """The sampled token of each of the `sequences`."""
        return StepOutput(output.token_ids[self.place])

    def carry(self, batch: Batch) -> Batch:
        """The batch after this one, with what it takes from this one's samples."""
        # An unknown token is its sequence's last, so who computes it samples the next.
        sequences = batch.samples.sequence
        order = self.samples.sequence.argsort(kind="stable")  # mostly it is ascending
        known = self.samples.sequence[order]
        place = known.searchsorted(sequences)
        place[place == len(known)] = 0
        carrying = np.flatnonzero(known[place] == sequences) if len(known) else place[:0]
        last = np.cumsum(batch.chunks.count)[batch.samples.chunk[carrying]] - 1
        return replace(batch, carried=Carried(last, order[place[carrying]]))
