"""From what a step computes to the arrays that cross to the runner."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.cache.block_table import BlockHolder
from batchllm.scheduler.batch import Batch, Chunks, Samples, SharedReads
from batchllm.scheduler.state import Segments

Ints = NDArray[np.int64]
_NO_TOKENS = np.zeros(0, dtype=np.int32)
_NO_BLOCKS = np.zeros((0, 0), dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens to compute: of `segments[i]` the `counts[i]` from `offset[i]` on, [n].

    `samples[i]`: it is a sequence, and this completes it, so that a token is sampled.
    """

    segments: Ints
    counts: Ints
    offset: Ints
    samples: NDArray[np.bool_]

    def with_(self, other: "Work") -> "Work":
        """Both, by segment."""
        if len(other.segments) == 0:
            return self
        segments = np.concatenate([self.segments, other.segments])
        order = segments.argsort(kind="stable")  # two ascending runs: it merges them
        return Work(
            segments[order],
            np.concatenate([self.counts, other.counts])[order],
            np.concatenate([self.offset, other.offset])[order],
            np.concatenate([self.samples, other.samples])[order],
        )


def assemble(
    state: Segments, tables: BlockHolder | None, nodes: Ints, work: Work, num_decodes: int
) -> Batch:
    """One step's batch.

    Args:
        state: the run state.
        tables: the segments' blocks, those for this step's tokens included; None leaves the
            batch without tokens and blocks.
        nodes: the nodes above the sequences that run, ascending.
        work: what to compute, segments ascending.
        num_decodes: how many of the chunks are decodes.
    """
    segments, offset = work.segments, work.offset
    begin = segments.searchsorted(nodes, side="right")
    end = segments.searchsorted(state.subtree_end[nodes], side="left")
    read = end > begin
    nodes = nodes[read]
    sampling = work.samples.nonzero()[0]
    sequences = segments[sampling]
    token_ids, blocks = _NO_TOKENS, _NO_BLOCKS
    if tables is not None:
        token_ids = state.token_ids(segments, offset, work.counts)
        blocks = tables.gather(np.concatenate([segments, nodes]))
    return Batch(
        token_ids=token_ids,
        chunks=Chunks(work.counts, state.start[segments] + offset, offset),
        shared=SharedReads(begin[read], end[read], state.start[nodes], state.length[nodes]),
        tables=blocks,
        samples=Samples(
            chunk=sampling,
            sequence=sequences,
            leaf=state.leaf[sequences],
            row_index=state.row_index[sequences],
            output_position=state.num_outputs[sequences],
            params_index=state.params_index[sequences],
            params=state.params,
        ),
        num_decodes=num_decodes,
    )
