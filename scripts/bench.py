"""The bench ladder: batchllm against its peers on the `micro` shapes, side by side.

Every round measures the machine's rates and then runs each engine once, as a process of its own in
its own virtual environment; which goes first changes from round to round. Printed are medians,
ratios within rounds, and the share of the bound T_opt (bench_engines/bound.py) that was reached.

    scripts/bench_setup.sh                     # once: the peers' environments and the model
    .venv/bin/python scripts/bench.py --out bench.json --markdown bench.md
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_engines import bound
from bench_engines.contract import EngineReport, Rows
from bench_engines.results import Run, markdown, summarise

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / ".bench"
ENGINES_FOLDER = ROOT / "scripts" / "bench_engines"
KV_CACHE_BYTES = 4 << 30  # what vllm_engine.py gives vLLM; the bound allows every engine as much


class BenchError(Exception):
    """Something is missing or failed; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Engine:
    """How to start one engine: whose Python, which model form, which row orders."""

    name: str
    python: Path
    model: Path
    orders: tuple[str, ...] = ("shuffled",)

    def command(self, workload: Path) -> list[str]:
        script = ENGINES_FOLDER / f"{self.name}_engine.py"
        command = [str(self.python), str(script), str(workload), "--model", str(self.model)]
        return [*command, "--order", *self.orders]


def engines(model: Path, python: Path) -> dict[str, Engine]:
    """All engines by name; `model` is the GGUF file ours reads."""
    peer_model = BENCH / "model"
    known = [
        Engine("batchllm", python, model),
        Engine("transformers", BENCH / "transformers/bin/python", peer_model),
        # In shuffled order its cache has to work; sorted is what a user can do to help it.
        Engine("vllm", BENCH / "vllm/bin/python", peer_model, ("shuffled", "sorted")),
    ]
    return {engine.name: engine for engine in known}


def check_there(chosen: list[Engine]) -> None:
    """Fails before the first run where an environment or a model is missing."""
    for engine in chosen:
        for needed in (engine.python, engine.model):
            if not needed.exists():
                raise BenchError(
                    f"{engine.name} needs {needed}, which is not there; "
                    "run scripts/bench_setup.sh first"
                )


def run_json(command: list[str]) -> list[dict[str, Any]]:
    """Runs a process and returns the JSON objects among its output lines.

    Raises:
        BenchError: it failed or printed none; the end of what it said is in the message.
    """
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not found:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise BenchError(f"exit code {done.returncode} from: {' '.join(command)}\n{said}")
    return found


def build_workload(shape: str) -> Path:
    """Makes the shape's Parquet file under .bench/."""
    path = BENCH / "data" / f"micro-{shape}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "datasets/micro.py"), str(path), "--shape", shape]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    if made.returncode != 0:
        raise BenchError(made.stderr.strip())
    say(made.stdout.strip().replace(str(path), shape))
    return path


def run_shape(
    shape: str, chosen: list[Engine], rounds: int, batch_sizes: list[int]
) -> Iterator[Run]:
    """Yields every run of one shape as it finishes."""
    path = build_workload(shape)
    rows = Rows.read(path, "shuffled")
    work = bound.measure([np.asarray(p, np.int32) for p in rows.prompts], rows.max_tokens)
    model = bound.SMOLLM2_135M
    for number in range(1, rounds + 1):
        measured = run_json([sys.executable, str(ENGINES_FOLDER / "rates.py")])[0]
        rates = bound.Rates(flops=measured["flops"], bandwidth=measured["bandwidth"])
        least = bound.bound(model, work, rates, KV_CACHE_BYTES // model.kv_bytes_per_token)
        say(
            f"{shape}, round {number}: {rates.flops / 1e9:.0f} GFLOP/s, "
            f"{rates.bandwidth / 1e9:.1f} GB/s, T_opt {least.overlap:.2f} s, "
            f"without overlap {least.total:.2f} s"
        )
        turn = number % len(chosen)
        for engine in chosen[turn:] + chosen[:turn]:
            command = engine.command(path)
            if engine.name == "transformers":
                command += ["--batch-size", *map(str, batch_sizes)]
            for line in run_json(command):
                report = EngineReport(**line)
                if engine.name == "transformers":
                    # Tried once, then kept: the sizes that lost would lose again.
                    batch_sizes = [int(report.settings["batch_size"])]
                yield Run(
                    shape=shape,
                    round=number,
                    report=report,
                    bound_overlap=least.overlap,
                    bound_total=least.total,
                )


def machine() -> dict[str, str | int]:
    """What the numbers were taken on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    return {"cpu": named.get("model name", "unknown"), "cores": os.cpu_count() or 0}


def write(runs: list[Run], out: Path | None, table: Path | None) -> None:
    """Writes all runs so far, so that an interrupted ladder keeps what it has."""
    if out is not None:
        document = {"machine": machine(), "runs": [asdict(run) for run in runs]}
        out.write_text(json.dumps(document, indent=1) + "\n")
    if table is not None:
        table.write_text(markdown(summarise(runs)) + "\n")


def say(message: str) -> None:
    """Tells how it goes, on stderr; stdout is for the table."""
    print(f"bench: {message}", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engines", default="batchllm,transformers,vllm", help="comma-separated")
    parser.add_argument("--shapes", default="8x32,4x16,256x1", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, default=BENCH / "model.gguf", help="for batchllm")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="for batchllm")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[32, 64], help="tried by transformers"
    )
    parser.add_argument("--out", type=Path, help="write all runs as JSON")
    parser.add_argument("--markdown", type=Path, help="write the table")
    return parser.parse_args()


def main() -> int:
    """Runs the ladder; exit code 1 where something is missing or failed."""
    arguments = parse()
    known = engines(arguments.model, arguments.python)
    runs: list[Run] = []
    try:
        names = arguments.engines.split(",")
        if unknown := set(names) - set(known):
            raise BenchError(f"no such engine: {', '.join(sorted(unknown))}; have {list(known)}")
        chosen = [known[name] for name in names]
        check_there(chosen)
        for shape in arguments.shapes.split(","):
            for run in run_shape(shape, chosen, arguments.rounds, arguments.batch_sizes):
                runs.append(run)
                say(f"{shape}, {run.label}: {run.report.engine_seconds:.2f} s")
                write(runs, arguments.out, arguments.markdown)
    except BenchError as error:
        say(str(error))
        return 1
    finally:
        if runs:
            print(markdown(summarise(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
