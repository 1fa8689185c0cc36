"""Simulates workloads on machines under every policy, and writes the table that is kept.

scripts/text_workloads.sh                                   # once
.venv/bin/python scripts/simulate.py --out SIMULATIONS.md
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchllm.cache.block_counts import BlockCounts
from batchllm.models.checkpoint import open_checkpoint
from batchllm.models.locate import resolve
from batchllm.prefix.plan import plan_tokens
from batchllm.prefix.policies.registry import AUTO, STREAMING
from batchllm.prefix.policies.sample import sample_first
from batchllm.report.plan import PlanReport, read_prompts
from batchllm.report.prompts import Prompts
from batchllm.report.simulation import SimulationReport, TableSimulation
from batchllm.request import RaggedTokens, SamplingParams
from batchllm.scheduler.factory import make_scheduler
from batchllm.scheduler.lengths import LengthEstimator
from batchllm.scheduler.scheduler import Scheduler
from batchllm.simulate.choose import Choice, choose_policy, simulate_choice
from batchllm.simulate.machine import get_machine
from batchllm.simulate.second_look import SecondLook
from batchllm.simulate.shape import get_shape
from batchllm.simulate.simulator import END_TOKEN
from batchllm.simulate.simulator import simulate as simulate_plan
from batchllm.text.prompt_spec import PromptSpec
from batchllm.text.prompts import PromptBuilder

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "datasets"))
import blend  # noqa: E402
import lengths  # noqa: E402
import micro  # noqa: E402
import tree  # noqa: E402

PAPER = micro.MicroShape(groups=400, members=16, prefix=2000, own=200, output=100)
MODEL = "llama-3.1-8b"
TRACES = ("lmsys", "sharegpt", "splitwise")
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Case:
    """A workload on a machine."""

    name: str
    machine: str
    build: Callable[[], Prompts]


TEMPLATES = {
    "tools": "{{ functions }}\n\n{{ question }}",
    "fewshot": "{{ head }}\n\n{{ question }}",
    "documents": "{{ doc_head }}\n\n{{ chapter_text }}\n\nOne passage of it:\n{{ section_text }}"
    "\n\n{{ question }}",
}


def cases() -> list[Case]:
    """Everything in the table, in its order."""

    def random(build: Callable[[], pa.Table]) -> Callable[[], Prompts]:
        return lambda: prompts_of(build())

    deep = ([1, 4, 16, 4096], [1024, 256, 128, 32])
    found = [
        *(Case("micro 400x16", m, random(lambda: micro.build(PAPER))) for m in ("a100", "h100")),
        Case("tree", "h100", random(lambda: tree.build(*deep))),
    ]
    for name, mix in blend.MIXES.items():
        found.append(Case(f"blend {name}", "h100", random(partial(blend.build, mix))))
    for trace in TRACES:
        for share in (0.0, 0.05, 0.35, 0.85):
            build = partial(lengths.build, trace, sharing=share)
            found.append(Case(f"{trace}, {share:.0%} shared", "h100", random(build)))
    # In 4,096 rows of this trace, the longest answer alone takes most of the run's steps.
    whole = partial(lengths.build, "lmsys", rows=20_000, sharing=0.35)
    found.append(Case("lmsys, 35% shared, 20,000 rows", "h100", random(whole)))
    for name, template in TEMPLATES.items():
        found.append(Case(name, "h100", partial(text_prompts, name, template)))
    return found


def prompts_of(table: pa.Table) -> Prompts:
    """A builder's table as prompts."""
    column = table["token_ids"].combine_chunks()
    offsets = column.offsets.to_numpy().astype(np.int64)
    tokens = RaggedTokens(column.values.to_numpy(), offsets)
    return Prompts(tokens, table["max_tokens"].to_numpy().astype(np.int64))


def text_prompts(name: str, template: str) -> Prompts:
    """A text workload, with the default model's tokenizer and chat template."""
    checkpoint = open_checkpoint(resolve(None))
    builder = PromptBuilder(
        PromptSpec(template=template, max_tokens_column="max_tokens"),
        checkpoint.tokenizer(),
        checkpoint.config.max_position_embeddings,
    )
    table = pq.read_table(ROOT / ".bench" / "data" / f"{name}.parquet")
    (prompts,) = read_prompts([table], builder, 1, PlanReport())
    return prompts


def simulate(case: Case) -> tuple[SimulationReport, SimulationReport]:
    """Run one case; and `auto` again where nothing runs side by side."""
    machine, shape, prompts = get_machine(case.machine), get_shape(MODEL), case.build()
    beside = TableSimulation(machine, shape)
    apart = TableSimulation(machine.with_overlap(None), shape, policies=[AUTO])
    for simulation in (beside, apart):
        simulation.add(prompts)
    return beside.report, apart.report


def rows(case: Case, report: SimulationReport, apart: SimulationReport) -> list[str]:
    """The case's lines of the table."""
    streaming = next(o for o in report.outcomes if o.policy == STREAMING)
    lines = []
    for o in [apart.outcomes[0], *report.outcomes]:
        name, chosen_in = o.policy, ""
        if o.policy == AUTO:
            of = apart if o is apart.outcomes[0] else report
            name, chosen_in = f"{AUTO} ({of.chosen[0]})", f"{of.choosing_seconds:.2f}"
            name += ", nothing side by side" if of is apart else ""
        lines.append(
            f"| {case.name} | {case.machine} | {name} | {o.saved_share:.1%} | {o.seconds:,.1f} "
            f"| {o.bound_share:.1%} | {o.total_share:.1%} | {streaming.seconds / o.seconds:.2f} "
            f"| {o.peak_kv_tokens / report.kv_tokens:.0%} | {o.preemptions:,} | {chosen_in} |"
        )
    return lines


class WatchedEstimator(LengthEstimator):
    """Notes, for every row that finishes, what it would have been expected to take at its start."""

    def __init__(self) -> None:
        super().__init__()
        self.expected_lengths: list[int] = []
        self.true_lengths: list[int] = []

    def observe(self, num_outputs: Ints, max_tokens: Ints) -> None:
        """Compare, then learn."""
        nothing = np.zeros_like(num_outputs)
        expected = self.remaining(nothing, max_tokens, np.zeros(len(nothing), dtype=np.bool_))
        self.expected_lengths += expected.tokens.tolist()
        self.true_lengths += num_outputs.tolist()
        super().observe(num_outputs, max_tokens)


def learned(trace: str, machine_name: str = "h100") -> str:
    """A trace with lengths known and learned: error of the estimate, and what it costs."""
    machine, shape = get_machine(machine_name), get_shape(MODEL)
    simulation = TableSimulation(machine, shape)
    prompts = prompts_of(lengths.build(trace, rows=20_000))
    longest = int(prompts.output_tokens.max())
    limits, costs = simulation.limits, simulation.costs
    sure = prompts.plan("dfs")
    known = simulate_choice(sure, sure.max_tokens[sure.tree.leaf_row], Choice("dfs"), limits, costs)
    plan = plan_tokens(prompts.tokens, [SamplingParams(max_tokens=longest)], policy="dfs")
    plan = replace(plan, leaf_order=sample_first(plan.tree, plan.leaf_order))
    estimator = WatchedEstimator()
    scheduler = make_scheduler("dfs", limits, frozenset({END_TOKEN}), estimator, holder=BlockCounts)
    outputs = prompts.output_tokens[plan.tree.leaf_row]
    run = simulate_plan(plan, outputs, scheduler, costs)
    true, expected = np.array(estimator.true_lengths), np.array(estimator.expected_lengths)
    late = len(true) // 20  # once something is known
    error = expected[late:] - true[late:]
    return (
        f"| {trace} | {len(true):,} | {longest:,} | {true.mean():.0f} | {error.mean():+.0f} "
        f"| {np.abs(error).mean():.0f} | {known.seconds:,.1f} | {run.seconds:,.1f} "
        f"| {run.seconds / known.seconds:.3f} | {run.preemptions:,} "
        f"| {run.preemptions / len(true):.2%} |"
    )


def again(trace: str, sharing: float, machine_name: str = "h100") -> str:
    """A trace with lengths learned, run as `auto` chose at first, and with its second look."""
    machine, shape = get_machine(machine_name), get_shape(MODEL)
    simulation = TableSimulation(machine, shape)
    limits, costs = simulation.limits, simulation.costs
    prompts = prompts_of(lengths.build(trace, rows=8192, sharing=sharing))
    longest = int(prompts.output_tokens.max())
    plan = plan_tokens(prompts.tokens, [SamplingParams(max_tokens=longest)], policy="dfs")
    outputs = prompts.output_tokens[plan.tree.leaf_row]
    limit = plan.max_tokens[plan.tree.leaf_row]
    choice = choose_policy(plan, limit, limits, costs, knows=False)
    plan = choice.order(plan, limit)
    plan = replace(plan, leaf_order=sample_first(plan.tree, plan.leaf_order))
    chosen: set[str] = set()
    seconds = []
    for looks in (False, True):
        scheduler = make_scheduler(AUTO, limits, frozenset({END_TOKEN}), holder=BlockCounts)
        assert isinstance(scheduler, Scheduler)
        look = SecondLook(plan, scheduler, limits, costs, chosen)
        watch = [look.after_step] if looks else []
        seconds.append(simulate_plan(plan, outputs, scheduler, costs, *watch).seconds)
    return (
        f"| {trace}, {sharing:.0%} shared | {choice} | {seconds[0]:,.1f} | {'; '.join(chosen)} "
        f"| {seconds[1]:,.1f} | {seconds[0] / seconds[1]:.3f} |"
    )


AGAIN_HEAD = """
## Chosen again when lengths are known

As above, 8,192 rows, some of their prompts shared; but by `auto`, which at first knows nothing, and
chooses again for the rows that have not begun when a tenth of the answers have ended (*seconds*
without and with that).

| trace | at first | seconds | then | seconds | ratio |
|---|---|---:|---|---:|---:|"""


LENGTHS_HEAD = """
## Lengths learned against lengths known

Every answer may take as many tokens as the longest of its trace; when it ends is learned from the
rows that have finished, of which 1 %, from all over the table, are run first. *Error* is of what a
row is expected to take at its start, after the first twentieth of the rows, mean and mean of the
absolute value, in tokens; *preempted* of a run with learned lengths.

| trace | rows | limit | mean | error | absolute | known | learned | ratio | preempted | share |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


HEAD = f"""# Simulations

Made by `scripts/simulate.py`: the scheduler, with the cost model in the model's place
(`batchllm/simulate/`; its compiled twin, which makes the same steps, but for `streaming`), for
{MODEL} in bfloat16. Answers' lengths are known. `streaming` is what vLLM does (first come, first
served, LRU block cache, its own default limits, one thing at a time). The others run half of a
step's attention beside the other half's products, where that is faster: on two fifths of the chip
it is taken to read at four fifths of its bandwidth, an assumption that no GPU has confirmed here,
so `auto` is there without it, too. *Long answers early*: so that none begins when the others are
nearly through.

Time is in seconds; *of T_opt* is the share of the bound that is reached, *no overlap* of the bound
for engines that do not compute and read memory at the same time; *x stream.* how many times faster
than `streaming`; *chosen in* the seconds that `auto` took to choose, on the two cores where this
page was made.

| workload | machine | policy | saved | time | of T_opt | no overlap | x stream. | KV | preempted \
| chosen in |
|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"""


def main() -> None:
    """Simulate every case that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    arguments = parser.parse_args()
    lines = [HEAD]
    for case in cases():
        if arguments.only not in case.name:
            continue
        started = time.process_time()
        report, apart = simulate(case)
        seconds = time.process_time() - started
        lines += rows(case, report, apart)
        print(f"{case.name} on {case.machine}: {seconds:.1f} s of CPU", file=sys.stderr)
    lines.append(LENGTHS_HEAD)
    lines += [learned(t) for t in TRACES if arguments.only in t]
    lines.append(AGAIN_HEAD)
    lines += [again(t, s) for t in TRACES if arguments.only in t for s in (0.0, 0.35, 0.85)]
    text = "\n".join(lines) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
