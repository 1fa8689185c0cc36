"""The engines of the ladder: whose Python runs which script on which form of the model."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / ".bench"
FOLDER = ROOT / "scripts" / "bench_engines"


class BenchError(Exception):
    """Something is missing or failed; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Engine:
    """How to start one engine: script, Python, model, further options, and useful row orders."""

    name: str
    script: str
    python: Path
    model: Path
    options: tuple[str, ...] = ()
    orders: tuple[str, ...] = ("shuffled", "sorted")

    def command(self, workload: Path, orders: Sequence[str]) -> list[str]:
        """What runs the rows of `workload` once in each of the orders, in one process."""
        start = [str(self.python), str(FOLDER / self.script), str(workload), "--name", self.name]
        return [*start, "--model", str(self.model), "--order", *orders, *self.options]

    def check_there(self) -> None:
        """Fails where the environment or the model is missing.

        Raises:
            BenchError: it is; better now than after hours.
        """
        for needed in (self.python, self.model):
            if not needed.exists():
                raise BenchError(
                    f"{self.name} needs {needed}, which is not there; "
                    "run scripts/bench_setup.sh first"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A model's: the file or directory that ours reads, the peers' bf16 and vLLM's int8 ones."""

    ours: Path
    peers: Path
    peers_int8: Path


def engines(weights: Weights, python: Path, batch_sizes: Sequence[int] = ()) -> dict[str, Engine]:
    """All engines by name.

    Args:
        weights: what each of them reads.
        python: what runs ours.
        batch_sizes: what transformers tries.
    """
    ours, vllm, model = "batchllm_engine.py", "vllm_engine.py", weights.ours
    vllm_python = BENCH / "vllm/bin/python"
    sizes = ("--batch-size", *map(str, batch_sizes)) if batch_sizes else ()
    known = [
        Engine("batchllm", ours, python, model),
        Engine("batchllm-int8", ours, python, model, ("--quantization", "int8")),
        # Keys and values in int8, too.
        Engine(
            "batchllm-int8-kv8",
            ours,
            python,
            model,
            ("--quantization", "int8", "--kv-cache-dtype", "int8"),
        ),
        Engine("vllm", vllm, vllm_python, weights.peers),
        # Without compiling the model: starts sooner, runs slower.
        Engine("vllm-eager", vllm, vllm_python, weights.peers, ("--enforce-eager",)),
        Engine("vllm-int8", vllm, vllm_python, weights.peers_int8),
        # It sorts rows by length itself, so that their order makes no difference.
        Engine(
            "transformers",
            "transformers_engine.py",
            BENCH / "transformers/bin/python",
            weights.peers,
            sizes,
            ("shuffled",),
        ),
    ]
    return {engine.name: engine for engine in known}


def run_json(command: Sequence[str]) -> list[dict[str, Any]]:
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
