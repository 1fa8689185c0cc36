"""How fast runs are simulated, by the scheduler and by its compiled twin, and what choosing costs.

The cases of simulate.py, in order `dfs`: million steps a minute of one core, the same ones of both;
then the seconds that `auto` takes to choose, all cores, against those of the run that it chooses.

    scripts/text_workloads.sh                                   # once
    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_simulator.py
"""

import argparse
import time
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray
from simulate import MODEL, Case, cases

from batchllm.cache.block_counts import BlockCounts
from batchllm.prefix.plan import PrefixPlan
from batchllm.report.simulation import TableSimulation
from batchllm.scheduler.factory import make_scheduler
from batchllm.simulate.choose import choose_policy, simulate_choice
from batchllm.simulate.compiled import compiled_simulator
from batchllm.simulate.machine import get_machine
from batchllm.simulate.shape import get_shape
from batchllm.simulate.simulator import END_TOKEN, SimulatedRun, simulate

Ints = NDArray[np.int64]
HEAD = """\
| case | steps | scheduler | compiled | ratio | chosen in s | of the run |
|---|---:|---:|---:|---:|---:|---:|"""


class Bench:
    """One case, planned."""

    def __init__(self, case: Case) -> None:
        self.name = f"{case.name}, {case.machine}"
        self.simulation = TableSimulation(get_machine(case.machine), get_shape(MODEL))
        self.plan: PrefixPlan = case.build().plan("dfs")
        self.outputs: Ints = self.plan.max_tokens[self.plan.tree.leaf_row]

    def by_scheduler(self) -> SimulatedRun:
        """Simulate with the scheduler itself."""
        limits, ends = self.simulation.limits, frozenset({END_TOKEN})
        scheduler = make_scheduler("dfs", limits, ends, holder=BlockCounts)
        return simulate(self.plan, self.outputs, scheduler, self.simulation.costs)

    def compiled(self) -> SimulatedRun:
        """Simulate with its compiled twin."""
        run = compiled_simulator()
        assert run is not None, "no simulator was compiled"
        return run(self.plan, self.outputs, self.simulation.limits, self.simulation.costs)

    def line(self) -> str:
        """The case's line of the table."""
        limits, costs = self.simulation.limits, self.simulation.costs
        seconds, runs = [], []
        for run in (self.by_scheduler, self.compiled):
            started = time.process_time()
            runs.append(run())
            seconds.append(time.process_time() - started)
        slow, fast = map(asdict, runs)
        assert all(abs(slow[k] - fast[k]) <= 1e-9 * slow[k] for k in slow), f"{slow}\n{fast}"
        started = time.perf_counter()
        choice = choose_policy(self.plan, self.outputs, limits, costs)
        choosing = time.perf_counter() - started
        chosen = simulate_choice(self.plan, self.outputs, choice, limits, costs).seconds
        steps = runs[0].steps
        rates = [60e-6 * steps / s for s in seconds]
        return (
            f"| {self.name} | {steps:,} | {rates[0]:.2f} | {rates[1]:.1f} "
            f"| {seconds[0] / seconds[1]:.0f} | {choosing:.2f} | {choosing / chosen:.1%} |"
        )


def main() -> None:
    """Every case that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    arguments = parser.parse_args()
    print(HEAD)
    for case in cases():
        if arguments.only in case.name:
            bench = Bench(case)
            bench.compiled()  # once, so that what products cost is known
            print(bench.line(), flush=True)


if __name__ == "__main__":
    main()
