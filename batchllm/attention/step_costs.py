"""What a layer's attention takes a backend, by what is in the step: numpy, no torch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.attention.sample_items import grouped, lone
from batchllm.least_squares import least_squares
from batchllm.runner.model_input import AttentionItems

Floats = NDArray[np.float64]
TimeItems = Callable[[AttentionItems, int], float]
"""(items, queries) to the seconds that a layer's attention takes."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds each, in the order of `counts_of`."""

    each: Floats

    def seconds(self, items: AttentionItems, num_queries: int) -> float:
        """What is expected of a step."""
        return float(self.each.dot(counts_of(items, num_queries)))


def counts_of(items: AttentionItems, num_queries: int) -> Floats:
    """A launch; queries; pairs of query and key in chunks; in shared segments; keys read; segments.

    A decode's own segment counts as keys that are read, and has no pairs.
    """
    queries = items.query_end - items.query_begin
    chunk = items.own & (queries > 1)
    unseen = queries * (queries - 1) // 2  # of a chunk's own keys, for the causal mask
    pairs = queries * items.kv_len
    in_chunks = int(pairs[chunk].sum() - unseen[chunk].sum())
    in_shared = int(pairs[~items.own].sum())
    reads = int(items.kv_len.sum())
    return np.array([1, num_queries, in_chunks, in_shared, reads, len(items)], dtype=np.float64)


def measure_step_costs(time_items: TimeItems, block_size: int) -> StepCosts:
    """Fit costs to the times of a few steps of all kinds, with room for some 130,000 tokens."""
    steps = sample_steps(block_size)
    counts = np.array([counts_of(*step) for step in steps])
    seconds = np.array([time_items(*step) for step in steps])
    return StepCosts(least_squares(counts / seconds[:, None], np.ones(len(steps))))


def sample_steps(block_size: int) -> list[tuple[AttentionItems, int]]:
    """Steps of every kind, and their numbers of queries."""
    chunks = [(64, 64, 64), (4, 1024, 1024), (2, 512, 4096), (1, 2048, 8192)]
    return [
        *sample_decodes(block_size),
        *((lone(*sizes, block_size), sizes[0] * sizes[1]) for sizes in chunks),
        (grouped(8, 16, 32, 1024, block_size), 8 * 16 * 32),
    ]


def sample_decodes(block_size: int) -> list[tuple[AttentionItems, int]]:
    """Those of decodes alone, with segments in common and without."""
    alone = [(256, 64), (1024, 128), (64, 2048)]
    groups = [(8, 4, 256), (16, 16, 2048), (64, 16, 512)]
    return [
        *((lone(count, 1, keys, block_size), count) for count, keys in alone),
        *((grouped(n, members, 1, keys, block_size), n * members) for n, members, keys in groups),
    ]
