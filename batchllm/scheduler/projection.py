"""How many KV blocks a set of sequences will need at its worst moment."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def first_sample_steps(prefill: Ints, remaining: Ints, budget: int) -> Ints:
    """Steps that pass before each sequence's first sample, [num_sequences].

    `prefill` are the tokens each sequence, in order of admission, still has to compute before it
    decodes (0 if it does already); a step takes all decodes and fills up to `budget` tokens with
    prefill in that order. What is admitted later cannot delay any of this.
    """
    start = np.zeros(len(prefill), dtype=np.int64)
    finish = np.where(prefill == 0, remaining, 0)  # the last step each decodes in, 0: not yet known
    queue = np.flatnonzero(prefill)
    due = np.cumsum(prefill[queue])
    done, filled, step = 0, 0, 1
    while done < len(queue):
        decodes = int(((finish >= step) & (start < step)).sum())
        if decodes >= budget:  # no room before the next one finishes
            step = int(finish[finish >= step].min()) + 1
            continue
        filled += budget - decodes
        ready = int(np.searchsorted(due, filled, side="right"))
        now = queue[done:ready]
        start[now] = step - 1
        finish[now] = step - 1 + remaining[now]
        done, step = ready, step + 1
    return start


@dataclass(frozen=True, slots=True)
class Projection:
    """What is known or expected of the admitted sequences; one entry a sequence, or a node.

    A sequence holds `private_tokens` of its own for `start` steps; in the step after those its
    first expected token is sampled; from then on it holds one token more every step, until it has
    sampled `remaining` (>= 1) and frees everything. A node's `node_blocks` are held through step
    `node_until`: the finish of some sequence, or later than all.
    """

    private_tokens: Ints
    start: Ints
    remaining: Ints
    node_blocks: Ints
    node_until: Ints

    def peak_blocks(self, block_size: int) -> int:
        """Most blocks held in any one step from now on.

        Between two finishes nothing is freed and everything grows, so the peak lies in a step in
        which some sequence finishes: only those are looked at. Exact where `remaining` and `start`
        are; a prompt is counted whole from now on though it may still be filling.
        """
        if len(self.private_tokens) == 0:
            return int(self.node_blocks.sum())
        finish = self.start + self.remaining
        moments = np.unique(finish)
        grown = np.clip(moments[:, None] - self.start - 1, 0, self.remaining - 1)
        blocks = -(-(self.private_tokens + grown) // block_size)
        held = np.where(finish >= moments[:, None], blocks, 0).sum(axis=1)
        shared = np.where(self.node_until >= moments[:, None], self.node_blocks, 0).sum(axis=1)
        return int((held + shared).max())
