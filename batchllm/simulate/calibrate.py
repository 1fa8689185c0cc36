"""From measured steps to a machine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from batchllm.least_squares import least_squares
from batchllm.scheduler.batch import Batch
from batchllm.simulate.cost import CostModel, work_of
from batchllm.simulate.machine import Machine
from batchllm.simulate.shape import ModelShape

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A batch and how long it took."""

    batch: Batch
    seconds: float


def calibrate(machine: Machine, shape: ModelShape, steps: Sequence[MeasuredStep]) -> Machine:
    """Fit what products do not explain of `steps` to the machine's other figures.

    `machine` brings the rates of the products and the memory. A step's rest is taken to be linear
    in: one for the step, its tokens, its samples, the pairs of query and key in prefill and shared
    reads, the tokens that decodes read, and the segments read apart. Fitted is the relative error,
    by least squares, without negative figures.
    """
    costs = CostModel(machine, shape)
    rows, rest = [], []
    for step in steps:
        work = work_of(step.batch)
        counts = (work.num_tokens, work.num_samples, work.pairs)
        features = np.array([1.0, *counts, work.decode_reads, work.num_segments])
        rows.append(features / step.seconds)
        products = costs.product(shape.body_parameters, work.num_tokens)
        products += costs.product(shape.head_parameters, work.num_samples)
        rest.append((step.seconds - products) / step.seconds)
    each, token, sample, pair, read, segment = least_squares(np.array(rows), np.array(rest))
    tiny = 1e-15
    return replace(
        machine,
        step_seconds=float(each),
        token_seconds=float(token),
        sample_seconds=float(sample),
        attention_rate=float(shape.attention_flops / max(pair, tiny)),
        kv_bandwidth=float(shape.kv_bytes_per_token / max(read, tiny)),
        segment_seconds=float(segment),
    )
