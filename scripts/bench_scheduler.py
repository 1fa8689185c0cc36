"""How long the scheduler takes for a step, as the engine runs it: tokens and block tables included.

Groups of 16 prompts share a prefix; memory suffices. `decodes` is a step in which all sequences
decode and none ends; `joining` one in which some end and others take their place, with lengths
known and with lengths learned. `ahead` are the same steps, each planned before the result of the
one before it is known.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_scheduler.py --running 256 1024 4096
"""

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from batchllm.cache.block_pool import BlockPool
from batchllm.prefix.plan import PrefixPlan, plan_tokens
from batchllm.request import RaggedTokens, SamplingParams
from batchllm.scheduler.base import StepScheduler
from batchllm.scheduler.batch import Batch, StepOutput
from batchllm.scheduler.scheduler import Scheduler

MEMBERS, PREFIX, OWN, MEAN = 16, 256, 64, 128  # tokens; MEAN is of the answers
END = 1
Ints = NDArray[np.int64]
Sample = Callable[[Batch], StepOutput]
Drive = Callable[[StepScheduler, Sample], Iterator[tuple[Batch, float]]]


def make_plan(rows: int, outputs: Ints, *, known: bool) -> PrefixPlan:
    """`rows` random prompts in groups, each with its number of output tokens, or a limit to all."""
    rng = np.random.default_rng(0)
    heads = rng.integers(2, 50_000, (rows // MEMBERS + 1, PREFIX), dtype=np.int32)
    prompts = [
        np.concatenate([heads[row // MEMBERS], rng.integers(2, 50_000, OWN, dtype=np.int32)])
        for row in range(rows)
    ]
    limits = outputs if known else np.full(rows, 2 * MEAN)
    lengths, index = np.unique(limits, return_inverse=True)
    params = [SamplingParams(max_tokens=int(n), ignore_eos=known) for n in lengths]
    return plan_tokens(RaggedTokens.from_sequences(prompts), params, index, policy="dfs")


def at_once(scheduler: StepScheduler, sample: Sample) -> Iterator[tuple[Batch, float]]:
    """Run step after step; yields each with its seconds of CPU."""
    while True:
        started = time.process_time()
        batch = scheduler.schedule()
        scheduled = time.process_time() - started
        output = sample(batch)
        started = time.process_time()
        scheduler.update(batch, output)
        yield batch, scheduled + time.process_time() - started


def ahead(scheduler: StepScheduler, sample: Sample) -> Iterator[tuple[Batch, float]]:
    """The same, each step planned before the result of the one before it is known."""
    before = scheduler.schedule()
    while True:
        started = time.process_time()
        scheduler.expect(before)
        batch = scheduler.schedule()
        scheduled = time.process_time() - started
        output = sample(before)
        started = time.process_time()
        scheduler.update(before, output)
        yield batch, scheduled + time.process_time() - started
        before = batch


def step_times(
    drive: Drive, running: int, steps: int, *, joining: bool, known: bool
) -> NDArray[np.float64]:
    """Seconds of CPU of `steps` steps with about `running` sequences, [steps]."""
    rows = running * (1 + (4 * steps // MEAN if joining else 0))
    rng = np.random.default_rng(1)
    outputs = rng.integers(1, 2 * MEAN, rows) if joining else np.full(rows, 10 * steps)
    plan = make_plan(rows, outputs, known=known)
    truth = outputs[plan.tree.leaf_row]
    scheduler = Scheduler(
        BlockPool(running * 400, 16),
        max_model_len=1 << 20,
        max_num_batched_tokens=8192 + running,
        max_num_seqs=running,
        eos_token_ids=frozenset({END}),
    )
    scheduler.add(plan)

    def sample(batch: Batch) -> StepOutput:
        samples = batch.samples
        ends = samples.output_position + 1 >= truth[samples.leaf]
        return StepOutput(np.where(ends, END, 0).astype(np.int32))

    times: list[float] = []
    warm = False  # once the first sequences are all decoding
    for batch, seconds in drive(scheduler, sample):
        warm = warm or batch.num_decodes > 0.9 * running
        if warm:
            times.append(seconds)
        if len(times) == steps:
            break
    return np.array(times)


def main() -> None:
    """Time every case at every size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--running", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--steps", type=int, default=256)
    arguments = parser.parse_args()
    cases = {
        "decodes": {"joining": False, "known": True},
        "joining, lengths known": {"joining": True, "known": True},
        "joining, lengths learned": {"joining": True, "known": False},
    }
    print("| step | running | median us | 99 % us | ahead: median us | 99 % us |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, options in cases.items():
        for running in arguments.running:
            figures = []
            for drive in (at_once, ahead):
                times = step_times(drive, running, arguments.steps, **options) * 1e6
                figures += [f"{np.median(times):,.0f}", f"{np.percentile(times, 99):,.0f}"]
            print(f"| {name} | {running:,} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
