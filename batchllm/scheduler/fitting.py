"""How many of the next sequences fit beside those that run."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.scheduler.timeline import sequence_events

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Demand:
    """The blocks that sequences in a row would hold; all arrays [n].

    Sequence i holds `private[i]` tokens until it has sampled in step `start[i]`, from then on one
    more a step, and nothing after step `finish[i]`. `lasting[i]` blocks come with it for good.
    """

    private: Ints
    start: Ints
    finish: Ints
    lasting: Ints
    block_size: int

    def in_step(self, step: int, count: int) -> Ints:
        """Blocks that the first 1, 2, … `count` hold in one step, added up, [count]."""
        grown = np.maximum(step - self.start[:count], 0)
        blocks = -(-(self.private[:count] + grown) // self.block_size)
        blocks[self.finish[:count] < step] = 0
        blocks += self.lasting[:count]
        return blocks.cumsum()

    def at_most(self) -> int:
        """No less than all of them ever hold at once: as if all ended together."""
        grown = self.private + (self.finish - self.start)
        return int((-(-grown // self.block_size)).sum() + self.lasting.sum())

    def in_steps(self, now: int, count: int) -> Ints:
        """Blocks that the first `count` hold in the steps from `now` on, until all have ended."""
        private = self.private[:count]
        events = sequence_events(private, self.start[:count], self.finish[:count], self.block_size)
        change = np.bincount(np.maximum(events.steps - now, 0), weights=events.amounts)
        change[0] += (-(-private // self.block_size)).sum() + self.lasting[:count].sum()
        return change.cumsum().astype(np.int64)


def how_many_fit(held: Ints, now: int, demand: Demand, spare: Floats, num_blocks: int) -> int:
    """The most sequences, from the first on, that fit in every step beside what is held.

    Idea: one more sequence never lowers what is held in any step, so a step that is too full
    for some number of them is too full for more. The fullest step without them says how many fit
    there; the fullest step with that many of them again, until there is no such step that is too
    full. Mostly that is one look, where bisection takes one for each power of two.

    Args:
        held: blocks held in the steps from `now` on, at least one; after the last, as in it.
        now: the first step.
        demand: what the sequences would hold.
        spare: blocks to leave free with 1, 2, … of them, ascending, [n].
        num_blocks: what there is.
    """
    count = len(spare)
    fullest = int(held.argmax())
    if int(held[fullest]) + demand.at_most() + spare[-1] <= num_blocks:
        return count
    while True:
        step_held = int(held[min(fullest, len(held) - 1)])
        with_them = step_held + demand.in_step(now + fullest, count) + spare[:count]
        count = int(np.count_nonzero(with_them <= num_blocks))
        if count == 0:
            return 0
        total = _sum(held, demand.in_steps(now, count))
        fullest = int(total.argmax())
        if int(total[fullest]) + spare[count - 1] <= num_blocks:
            return count


def _sum(held: Ints, more: Ints) -> Ints:
    """Add two step by step, each going on as it ends."""
    short, long = (held, more) if len(held) < len(more) else (more, held)
    total: Ints = long + short[-1]
    total[: len(short)] = long[: len(short)] + short
    return total
