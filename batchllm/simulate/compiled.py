"""The simulator's compiled twin."""

from collections.abc import Callable
from ctypes import Structure, byref, c_double, c_int64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchllm.native.simulator import load_simulator
from batchllm.prefix.plan import PrefixPlan
from batchllm.scheduler.factory import SchedulerLimits
from batchllm.scheduler.state import Segments
from batchllm.simulate.cost import LEAST_HIDDEN, CostModel
from batchllm.simulate.simulator import SimulatedRun

Ints = NDArray[np.int64]
_SECONDS = tuple(f"{what}_seconds" for what in ("gemm", "head", "attention", "overhead", "hidden"))
_COUNTS = (
    *("steps", "computed_prompt_tokens", "recomputed_tokens", "output_tokens"),
    *("preemptions", "failed", "peak_kv_blocks"),
)
CompiledSimulator = Callable[[PrefixPlan, Ints, SchedulerLimits, CostModel], SimulatedRun]


class _Window(Structure):
    """`SimulatedWindow` of native/src/simulator/simulate.h."""

    _fields_ = (
        *((name, c_int64) for name in ("num_segments", "num_leaves")),
        *((name, c_void_p) for name in ("parent", "subtree_end", "length", "leaf", "max_tokens")),
        *((name, c_void_p) for name in ("ignore_eos", "of_leaf", "order", "ends")),
    )


class _Limits(Structure):
    """`SimulatedLimits`."""

    _fields_ = tuple(
        (name, c_int64) for name in ("num_blocks", "block_size", "step_tokens", "max_num_seqs")
    )


class _Costs(Structure):
    """`SimulatedCosts`."""

    _fields_ = (
        *((name, c_double) for name in ("step", "token", "sample", "segment", "pair", "read")),
        *((name, c_double) for name in ("weights", "overlap_share", "overlap_speed")),
        *(("least_hidden", c_double), ("num_layers", c_int64), ("one_attention_launch", c_int64)),
        *((name, c_void_p) for name in ("body", "head")),
    )


class _Result(Structure):
    """`SimulatedResult`."""

    _fields_ = (
        *((name, c_double) for name in _SECONDS),
        *((name, c_int64) for name in _COUNTS),
    )


def compiled_simulator() -> CompiledSimulator | None:
    """`simulate` on a fresh `Scheduler` with such limits, twenty to a hundred times as fast.

    It makes the same steps and says the same of them. None where it was not compiled.
    """
    run = load_simulator()
    if run is None:
        return None

    def simulate(
        plan: PrefixPlan, outputs: Ints, limits: SchedulerLimits, costs: CostModel
    ) -> SimulatedRun:
        return _simulate(run, plan, outputs, limits, costs)

    return simulate


def _simulate(
    run: Callable[..., int],
    plan: PrefixPlan,
    outputs: Ints,
    limits: SchedulerLimits,
    costs: CostModel,
) -> SimulatedRun:
    state = Segments(plan, limits.max_model_len)
    step_tokens = limits.max_num_batched_tokens
    if plan.step_tokens is not None:
        step_tokens = min(step_tokens, plan.step_tokens)
    arrays = (
        *(state.parent, state.subtree_end, state.length, state.leaf, state.max_tokens),
        *(state.ignore_eos, state.of_leaf, state.of_leaf[plan.leaf_order]),
        np.minimum(outputs, plan.max_tokens[plan.tree.leaf_row]),
    )
    machine, products = costs.machine, costs.product_tables(max(step_tokens, limits.max_num_seqs))
    result = _Result()
    failed = run(
        byref(_Window(state.count, plan.tree.num_leaves, *map(_address, arrays))),
        byref(_Limits(limits.num_blocks, limits.block_size, step_tokens, limits.max_num_seqs)),
        byref(
            _Costs(
                *(machine.step_seconds, machine.token_seconds, machine.sample_seconds),
                *(machine.segment_seconds, costs.pair_seconds, costs.read_seconds),
                *(costs.weights_seconds, machine.overlap_share, machine.overlap_speed),
                *(LEAST_HIDDEN, costs.shape.num_layers, machine.one_attention_launch),
                *map(_address, products),
            )
        ),
        byref(result),
    )
    assert not failed, "the scheduler broke a rule of its own"
    return SimulatedRun(
        prompt_tokens=plan.tree.num_prompt_tokens,
        **{name: getattr(result, name) for name in (*_SECONDS, *_COUNTS)},
    )


def _address(array: NDArray[Any]) -> int:
    assert array.flags.c_contiguous
    return array.ctypes.data
