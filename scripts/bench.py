"""The bench ladder: batchllm against its peers, side by side.

In every round, for every workload, the machine's rates are measured and then each engine runs, as a
process of its own in its own virtual environment, with the rows shuffled and sorted; who goes first
changes from round to round. Printed are medians, speed-ups within rounds, and the share of the
bound T_opt (bench_engines/bound.py) that was reached. Rounds are outermost and every run is written
at once, so that an interrupted ladder has whole rounds, and --resume goes on with it.

    scripts/bench_setup.sh                     # once: the peers' environments and the model
    scripts/text_workloads.sh                  # once: the tables of text
    .venv/bin/python scripts/bench.py --out bench.json --markdown bench.md

With --model-shape all engines get random weights of another model's shape.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from bench_engines import bound
from bench_engines.contract import KV_CACHE_BYTES, EngineReport, Rows
from bench_engines.engines import BENCH, FOLDER, BenchError, Engine, engines, run_json
from bench_engines.ledger import Ledger
from bench_engines.results import Run, markdown
from bench_engines.subject import Subject, default_subject, shape_subject
from bench_engines.workloads import LADDER, WORKLOADS, Workload, WorkloadError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A workload that lies there to be read, and what it must cost."""

    workload: Workload
    path: Path
    work: bound.Workload


def prepare(workload: Workload, model: Path, ledger: Ledger) -> Prepared:
    """Makes the workload's file if need be, and states its size."""
    path = workload.make(BENCH / "data", model)
    rows = Rows.read(path, "shuffled")
    prompt_tokens = sum(map(len, rows.prompts))
    ledger.check_size(workload.name, rows=len(rows), prompt_tokens=prompt_tokens)
    work = bound.measure([np.asarray(p, np.int32) for p in rows.prompts], rows.max_tokens)
    say(
        f"{workload.name}: {len(rows):,} rows, {prompt_tokens:,} prompt tokens, "
        f"{work.tree_tokens:,} distinct, {work.output_tokens:,} output tokens"
    )
    return Prepared(workload, path, work)


def run_cell(
    prepared: Prepared, number: int, chosen: list[Engine], sizes: bound.ModelShape
) -> Iterator[Run]:
    """Yields every run of one workload in one round as its process ends."""
    workload, work = prepared.workload, prepared.work
    measured = run_json([sys.executable, str(FOLDER / "rates.py"), json.dumps(asdict(sizes))])[0]
    rates = bound.Rates(flops=measured["flops"], bandwidth=measured["bandwidth"])
    least = bound.bound(sizes, work, rates, KV_CACHE_BYTES // sizes.kv_bytes_per_token)
    say(
        f"{workload.name}, round {number}: {rates.flops / 1e9:.0f} GFLOP/s, "
        f"{rates.bandwidth / 1e9:.1f} GB/s, T_opt {least.overlap:.2f} s"
    )
    for engine in alternated(chosen, number):
        orders = [order for order in engine.orders if order in workload.orders]
        for line in run_json(engine.command(prepared.path, alternated(orders, number))):
            yield Run(
                workload=workload.name,
                in_shared_mean=workload.in_shared_mean,
                round=number,
                report=EngineReport(**line),
                distinct_tokens=work.tree_tokens,
                bound_overlap=least.overlap,
                bound_total=least.total,
                flops=rates.flops,
                int8_flops=measured["int8_flops"],
                bandwidth=rates.bandwidth,
            )


def settled(engine: Engine, workload: str, runs: Iterable[Run]) -> Engine:
    """The engine with the batch size it chose on this workload before, if it chooses one.

    Tried once, then kept: the sizes that lost would lose again.
    """
    for run in runs:
        size = run.report.settings.get("batch_size")
        if (run.workload, run.report.engine) == (workload, engine.name) and size is not None:
            return replace(engine, options=("--batch-size", str(size)))
    return engine


def alternated(things: list[T], number: int) -> list[T]:
    """The same things, another one first in every round; round 1 has them as they are."""
    turn = (number - 1) % len(things)
    return things[turn:] + things[:turn]


def machine(model_shape: str | None) -> dict[str, str | int]:
    """What the numbers are taken on, and of what model if it is not the default one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    here = {"cpu": named.get("model name", "unknown"), "cores": os.cpu_count() or 0}
    return here if model_shape is None else here | {"model": model_shape}


def say(message: str) -> None:
    """Tells how it goes, on stderr; stdout is for the tables."""
    print(f"bench: {message}", file=sys.stderr, flush=True)


def choose(known: dict[str, T], names: str, what: str) -> list[T]:
    """The named things, in the order of their names on the command line.

    Raises:
        BenchError: there is no such thing.
    """
    wanted = names.split(",")
    if unknown := sorted(set(wanted) - set(known)):
        raise BenchError(f"no such {what}: {', '.join(unknown)}; have {', '.join(known)}")
    return [known[name] for name in wanted]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", default="batchllm,vllm", help="comma-separated")
    parser.add_argument("--workloads", default=",".join(LADDER), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, default=BENCH / "model.gguf", help="for batchllm")
    parser.add_argument("--model-shape", help="run random weights of this shape instead")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="for batchllm")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[32, 64], help="tried by transformers"
    )
    parser.add_argument("--out", type=Path, help="write all runs as JSON, after every one")
    parser.add_argument("--resume", action="store_true", help="go on with what --out holds")
    parser.add_argument("--markdown", type=Path, help="write the tables, after every run")
    arguments = parser.parse_args()
    if arguments.resume and arguments.out is None:
        parser.error("--resume needs --out, the file to go on with")
    return arguments


def subject_of(arguments: argparse.Namespace) -> Subject:
    """The model that the command line names."""
    if arguments.model_shape is None:
        return default_subject(arguments.model)
    return shape_subject(arguments.model_shape)


def climb(arguments: argparse.Namespace, ledger: Ledger) -> None:
    """Runs what the ledger does not have yet, round by round."""
    subject = subject_of(arguments)
    known = engines(subject.weights, arguments.python, arguments.batch_sizes)
    chosen = choose(known, arguments.engines, "engine")
    subject.make(chosen)
    for engine in chosen:
        engine.check_there()
    workloads = choose(WORKLOADS, arguments.workloads, "workload")
    prepared = [prepare(workload, arguments.model, ledger) for workload in workloads]
    names = [engine.name for engine in chosen]
    for number in range(1, arguments.rounds + 1):
        for one in prepared:
            name = one.workload.name
            if ledger.has_cell(name, number, names):
                say(f"{name}, round {number}: already there")
                continue
            ledger.drop(name, number, names)
            ready = [settled(engine, name, ledger.runs) for engine in chosen]
            for run in run_cell(one, number, ready, subject.sizes):
                ledger.add(run)
                say(f"{name}, round {number}, {run.label}: {run.engine_seconds:.2f} s")
                if arguments.markdown is not None:
                    arguments.markdown.write_text(markdown(ledger.runs) + "\n")


def main() -> int:
    """Runs the ladder; exit code 1 where something is missing or failed."""
    arguments = parse()
    try:
        ledger = Ledger.open(arguments.out, machine(arguments.model_shape), resume=arguments.resume)
    except BenchError as error:
        say(str(error))
        return 1
    try:
        climb(arguments, ledger)
    except (BenchError, WorkloadError) as error:
        say(str(error))
        return 1
    finally:
        if ledger.runs:
            print(markdown(ledger.runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
