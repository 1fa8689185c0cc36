"""Long answers early enough."""

import numpy as np

from batchllm.prefix.tree import Ints


def in_time(order: Ints, outputs: Ints, outputs_per_step: float) -> Ints:
    """The order with those leaves moved up that would else be answered long after the others.

    Whoever begins a long answer near the end makes the machine run on for it, nearly empty: the
    oldest rule of list scheduling, longest first, is there for this (Graham, 1969). But sorted by
    length, rows that share a prefix would be far apart. So only those move that begin too late: of
    a run of N steps, about i / n have gone by when it is the turn of place i of n, and an answer of
    L tokens should have its turn at place n (1 - L / N) at the latest.

    A leaf that is moved up takes its prefix along, which waits in memory for the others below it,
    or is computed again if there is no room.

    Args:
        order: the leaves, [num_leaves].
        outputs: their answers' expected lengths, [num_leaves].
        outputs_per_step: tokens of answers that a step gives, so that the run has
            `outputs.sum() / outputs_per_step` steps. Higher moves more leaves.
    """
    count = len(order)
    num_steps = outputs.sum() / outputs_per_step
    latest = count * (1 - outputs[order] / num_steps)
    return order[np.argsort(np.minimum(np.arange(count), latest), kind="stable")]
