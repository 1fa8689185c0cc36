"""What this machine does with a model: measured, fitted, and compared with what is predicted."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from batchllm.api import LLM
from batchllm.prefix.plan import PrefixPlan, plan_tokens
from batchllm.request import RaggedTokens, SamplingParams, TokenIds
from batchllm.runner.clock import OTHER, PARTS, SCHEDULER, Clock
from batchllm.runner.device_runner import DeviceRunner
from batchllm.runner.measure import gemm_rates, read_bandwidth
from batchllm.runner.torch_runner import TorchRunner
from batchllm.scheduler.batch import Batch, StepOutput
from batchllm.simulate.bound import bound
from batchllm.simulate.calibrate import MeasuredStep, calibrate
from batchllm.simulate.choose import Choice, simulate_choice
from batchllm.simulate.cost import CostModel
from batchllm.simulate.machine import Machine

Ints = NDArray[np.int64]
_ROUNDS = 3  # of calibrating
_FIRST_ID = 20  # ids below are special tokens in many vocabularies


@dataclass(frozen=True, slots=True)
class Workload:
    """Groups of rows with a prefix each: random token ids, sizes in rows and tokens.

    Answers have `output` tokens, or where `output_max` is given, evenly from `output` to that.
    """

    name: str
    groups: int
    members: int
    prefix: int
    own: int
    output: int
    output_max: int = 0

    def plan(self, vocab_size: int, seed: int = 0) -> PrefixPlan:
        """The workload, planned depth-first with known lengths."""
        rng = np.random.default_rng(seed)
        rows = self.groups * self.members
        prefixes = rng.integers(_FIRST_ID, vocab_size, (self.groups, self.prefix))
        endings = rng.integers(_FIRST_ID, vocab_size, (rows, self.own))
        tokens = np.concatenate([np.repeat(prefixes, self.members, axis=0), endings], axis=1)
        lengths = rng.integers(self.output, max(self.output, self.output_max) + 1, rows)
        each, index = np.unique(lengths, return_inverse=True)
        params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in each.tolist()]
        offsets = np.arange(rows + 1) * tokens.shape[1]
        ragged = RaggedTokens(tokens.ravel().astype(np.int32), offsets)
        return plan_tokens(ragged, params, index, policy="dfs")


# What the figures are fitted to, and other workloads that they are checked on.
CALIBRATION = (
    Workload("short prompts", 96, 1, 0, 24, 6),
    Workload("long prompts", 6, 1, 0, 700, 8),
    Workload("few long prefixes", 2, 24, 600, 16, 24),
    Workload("many short prefixes", 24, 6, 80, 24, 10),
    Workload("few rows", 4, 1, 0, 60, 24),
    Workload("uneven answers", 3, 12, 300, 40, 4, 60),
)
CHECKS = (
    Workload("8x32, 512/32/32", 8, 32, 512, 32, 32),
    Workload("4x16, 1024/64/8-128", 4, 16, 1024, 64, 8, 128),
    Workload("64x1, 0/256/32", 64, 1, 0, 256, 32),
    Workload("1x256, 370/40/2", 1, 256, 370, 40, 2),
    Workload("32x4, 120/60/20", 32, 4, 120, 60, 20),
)


@dataclass(frozen=True, slots=True)
class BenchResult:
    """A workload measured, simulated, and bounded, in seconds; tokens are prompt and output.

    `parts` are those of runner/clock.py, in sum `seconds`; `outside` is what a table would take
    beside these, before and after: planning, and answers to text and a file.
    """

    workload: Workload
    seconds: float
    parts: dict[str, float]
    outside: dict[str, float]
    predicted: float
    bound: float
    num_tokens: int

    def as_text(self) -> str:
        """Two lines of a table."""
        parts = [
            f"{name} {self.parts.get(name, 0) / self.seconds:.1%}"
            for name in sorted(PARTS, key=lambda name: -self.parts.get(name, 0))
        ]
        outside = [f"{name} {seconds:.2f} s" for name, seconds in self.outside.items()]
        return (
            f"  {self.workload.name:<24} {self.seconds:>8.2f} s "
            f"{self.num_tokens / self.seconds:>9,.0f} tokens/s  "
            f"predicted {self.predicted:>7.2f} s ({self.predicted / self.seconds - 1:+.1%})  "
            f"{self.bound / self.seconds:>5.1%} of T_opt\n"
            f"    {', '.join(parts)}; beside it {', '.join(outside)}"
        )


@dataclass(frozen=True, slots=True)
class BenchRun:
    """A workload's steps, its answers as they were finished, and the parts of its seconds."""

    steps: list[MeasuredStep]
    answers: list[TokenIds]
    parts: dict[str, float]

    @classmethod
    def fastest(cls, runs: Sequence["BenchRun"]) -> "BenchRun":
        """Of the same steps run several times, the fastest of each; parts as in the fastest run.

        That is what the machine does undisturbed: whatever else it does can only slow a step down.
        """
        steps = [
            min(same, key=lambda step: step.seconds)
            for same in zip(*(run.steps for run in runs), strict=True)
        ]
        best = min(runs, key=lambda run: run.seconds)
        share = sum(step.seconds for step in steps) / best.seconds
        return cls(steps, best.answers, {name: share * s for name, s in best.parts.items()})

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(step.seconds for step in self.steps)


class Bench:
    """Runs workloads on a loaded model, step by step, with a clock."""

    def __init__(self, llm: LLM, clock: Clock) -> None:
        self._llm = llm
        self._clock = clock

    def calibrate(
        self, checks: Sequence[Workload] = CHECKS, notify: Callable[[str], None] = lambda _: None
    ) -> tuple[Machine, list[BenchResult]]:
        """Measure products and memory, run workloads, and fit; predict `checks`, not fitted to.

        All of them take turns, a few rounds, since machines that are shared are slower at times:
        by what was measured in one minute, another's could not be told.
        """
        llm = self._llm
        assert isinstance(llm.runner, TorchRunner | DeviceRunner), "fake takes no clock"
        pack, settle = llm.runner.operations.pack, self._clock.settle
        runs: dict[str, list[BenchRun]] = {w.name: [] for w in (*CALIBRATION, *checks)}
        machine = replace(llm.machine, gemm_rates=(), bandwidth=0.0)
        self.run(CALIBRATION[0])  # the first steps of a process are slower
        for number in range(1, _ROUNDS + 1):
            notify(f"round {number} of {_ROUNDS}: matrix products and memory")
            with torch.device(llm.device):
                machine = machine.at_best(
                    gemm_rates(llm.shape, llm.dtype, pack, settle), read_bandwidth(settle)
                )
            for workload in (*CALIBRATION, *checks):
                notify(f"round {number} of {_ROUNDS}: {workload.name}")
                runs[workload.name].append(self.run(workload))
        fastest = {name: BenchRun.fastest(some) for name, some in runs.items()}
        steps = [step for workload in CALIBRATION for step in fastest[workload.name].steps]
        machine = calibrate(machine, llm.shape, steps)
        return machine, [self._result(w, fastest[w.name], machine) for w in checks]

    def check(self, workload: Workload, machine: Machine) -> BenchResult:
        """Run a workload and compare with what the machine's figures say."""
        return self._result(workload, self.run(workload), machine)

    def _result(self, workload: Workload, run: BenchRun, machine: Machine) -> BenchResult:
        llm = self._llm
        started = time.perf_counter()
        plan = workload.plan(llm.checkpoint.config.vocab_size)
        outside = {"making and planning prompts": time.perf_counter() - started}
        outputs = plan.max_tokens[plan.tree.leaf_row]
        outside["decoding and writing answers"] = self._write(run.answers)
        costs = CostModel(machine, llm.shape)
        predicted = simulate_choice(plan, outputs, Choice("dfs"), llm.limits, costs).seconds
        least = bound(plan.tree, outputs, machine, llm.shape, llm.num_kv_tokens).overlap
        tokens = int(plan.tokens.lengths.sum() + plan.max_tokens.sum())
        return BenchResult(workload, run.seconds, run.parts, outside, predicted, least, tokens)

    def run(self, workload: Workload) -> BenchRun:
        """Run a workload, with a clock for each step and for the parts of all."""
        clock, scheduler = self._clock, self._llm.new_scheduler()
        run = BenchRun([], [], {})
        scheduler.add(workload.plan(self._llm.checkpoint.config.vocab_size))
        clock.seconds.clear()
        schedule = clock.timed(SCHEDULER, scheduler.schedule)
        update = clock.timed(SCHEDULER, scheduler.update)
        while scheduler.has_unfinished:
            started = time.perf_counter()
            batch: Batch = schedule()
            output: StepOutput = self._llm.runner.execute(batch)
            run.answers.extend(sequence.output_token_ids for sequence in update(batch, output))
            run.steps.append(MeasuredStep(batch, time.perf_counter() - started))
        clock.seconds[OTHER] = run.seconds - sum(clock.seconds.values())
        run.parts.update(clock.seconds)
        return run

    def _write(self, answers: list[TokenIds]) -> float:
        """Seconds from token ids to a Parquet file of texts."""
        started = time.perf_counter()
        texts = self._llm.tokenizer.decode_batch(answers)
        with TemporaryFile() as file:
            pq.write_table(pa.table({"answer": texts}), file)
        return time.perf_counter() - started
