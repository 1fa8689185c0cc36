"""Kill and starve `batchllm run` in every way, go on, and compare with a run that was left alone.

    python scripts/faults.py operations            # every file operation fails, or is the last
    python scripts/faults.py kills --count 200     # SIGKILL at random instants, model `fake`
    python scripts/faults.py kills --count 20 --model default

Each job goes on until it is complete; then its output must verify, and hold what an undisturbed
run's holds, but for `cached_tokens`, which says what was computed and not what was answered. Needs
a C compiler (`cc`) for `operations`. Exit code 1 when anything was not as it should be.
"""

import argparse
import importlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import typer.testing
from fault_harness.child import Ended, Fault, run

import batchllm.api
import batchllm.cli
import batchllm.io.journal
import batchllm.io.output
import batchllm.io.spool
from batchllm.errors import OutputError
from batchllm.io.inspect import read_run
from batchllm.verify import verify

ROOT = Path(__file__).resolve().parent.parent
SHIM = Path(__file__).parent / "fault_harness" / "shim.c"


OUTPUTS = {"file": ["out.parquet"], "directory": ["out"], "both": ["out.parquet", "out"]}


@dataclass(frozen=True, slots=True)
class Job:
    """A command without its output, and where it works."""

    words: tuple[str, ...]
    scratch: Path

    def command(self, output: Path, *extra: object) -> list[str]:
        return ["run", self.words[0], str(output), *self.words[1:], *map(str, extra)]


class WrongError(Exception):
    """Something was lost, twice, changed, left behind, or badly said."""


def content(output: Path) -> pa.Table:
    """What an output holds, but for what was computed for it."""
    files = [output] if output.is_file() else sorted(output.glob("*.parquet"))
    whole = pa.concat_tables([pq.read_table(file, partitioning=None) for file in files])
    return whole.drop_columns("cached_tokens")


def leftovers(root: Path) -> list[str]:
    """Everything below a directory."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def check_complete(output: Path, expected: pa.Table, names: list[str]) -> None:
    """The output is good, equal to an undisturbed run's, and nothing else is there."""
    verdict = verify(output)
    if not verdict.is_good:
        raise WrongError("; ".join(verdict.wrong))
    if not content(output).equals(expected):
        raise WrongError("the output is not what an undisturbed run's is")
    if leftovers(output.parent) != names:
        raise WrongError(f"left behind: {leftovers(output.parent)}")


def check_words(ended: Ended) -> None:
    """A failure is told in one line."""
    if "Traceback" in ended.stderr or "Exception ignored" in ended.stderr:
        raise WrongError(f"a traceback was shown: {ended.stderr[-2000:]}")
    if ended.code not in (0, 1) and ended.code != -9:
        raise WrongError(f"exit code {ended.code}: {ended.stderr[-500:]}")
    if ended.code == 1 and not ended.stderr.strip().splitlines()[-1].startswith("batchllm: "):
        raise WrongError(f"no reason given: {ended.stderr[-500:]}")


def operations(every: int, names: Sequence[str], scratch: Path) -> Counter[str]:
    """Each file operation of a small job, in a file and in a directory, meets each fault."""
    import_all()
    batchllm.api._KEEP_SECONDS = -1.0  # after every step
    batchllm.io.journal._SYNC_SECONDS = 0.0
    batchllm.io.output._PART_ROWS = 12
    batchllm.io.spool._BUDGET_BYTES = 300
    job = Job(
        (
            str(make_table(scratch / "in.parquet", 30)),
            *("--model", "fake", "--prompt-column", "text", "--max-tokens", "6", "--quiet"),
            *("--window-rows", "10", "--max-num-seqs", "4", "--kv-memory", "64K", "--threads", "1"),
            *("--policy", "dfs"),
        ),
        scratch,
    )
    counts: Counter[str] = Counter()
    for name in names:
        clean = scratch / "clean" / name
        whole = run(job.command(clean), scratch, below=clean.parent)
        assert whole.code == 0, whole.stderr
        expected, left = content(clean), leftovers(clean.parent)
        print(f"{name}: {whole.num_operations} file operations", flush=True)
        for fault in list(Fault)[1:]:
            for at in range(0, whole.num_operations + every, every):
                output = scratch / f"{fault.name}-{at}" / name
                output.parent.mkdir()
                where = f"{name}, {fault.name} at operation {at}"
                first = run(job.command(output), scratch, fault=fault, at=at, below=output.parent)
                try:
                    check_words(first)
                    again = run(job.command(output), scratch)
                    if again.code != 0:
                        raise WrongError(f"does not go on: {again.stderr}")
                    check_complete(output, expected, left)
                except WrongError as wrong:
                    counts["wrong"] += 1
                    print(f"WRONG: {where}: {wrong}", flush=True)
                counts[f"{fault.name}: {_ending(first)}"] += 1
                shutil.rmtree(output.parent)
        shutil.rmtree(clean.parent)
    return counts


def _ending(ended: Ended) -> str:
    return {0: "went on", 1: "refused", -9: "killed"}.get(ended.code, str(ended.code))


def kills(count: int, model: str, seed: int, scratch: Path) -> Counter[str]:
    """SIGKILL at random instants, going on with other windows, threads and memory each time."""
    import_all()
    rng = random.Random(seed)
    is_fake = model == "fake"
    job = Job(
        (
            str(make_table(scratch / "in.parquet", 3000 if is_fake else 60)),
            *(() if model == "default" else ("--model", model)),
            *("--prompt-column", "text", "--max-tokens", "24", "--quiet"),
            # A real model's last bits may depend on the window, unless told not to.
            *(("--max-num-seqs", "64") if is_fake else ("--deterministic",)),
        ),
        scratch,
    )
    counts: Counter[str] = Counter()
    kinds: list[tuple[float, pa.Table, list[str]]] = []
    for number in itertools.count():
        if counts["killed"] >= count:
            break
        sampling = () if number % 2 else ("--temperature", "0.8", "--top-p", "0.9", "--seed", "5")
        name = "out.parquet" if number % 4 < 2 else "out"
        if number < 4:  # each kind once undisturbed
            clean = scratch / f"clean-{number}" / name
            started = time.monotonic()
            whole = run(job.command(clean, *sampling), scratch)
            assert whole.code == 0, whole.stderr
            seconds = time.monotonic() - started
            kinds.append((seconds, content(clean), leftovers(clean.parent)))
            shutil.rmtree(clean.parent)
        seconds, expected, names = kinds[number % 4]
        output = scratch / f"job-{number}" / name
        output.parent.mkdir()
        finished = 0
        try:
            while True:
                options = (
                    *("--window-rows", rng.choice([20, 100, 500, 5000])),
                    *("--threads", rng.choice([1, 2])),
                    *("--kv-memory", rng.choice(["2M", "8M"] if is_fake else ["64M", "256M"])),
                )
                words = job.command(output, *sampling, *options)
                # Past its end as well: a slower machine than that of the clean run gets there too.
                ended = run(words, scratch, kill_after=rng.uniform(0, 1.5 * seconds))
                check_words(ended)
                if ended.code == 0:
                    break
                if ended.code != -9:
                    raise WrongError(ended.stderr)
                counts["killed"] += 1
                print(".", end="", flush=True)
                before, finished = finished, num_finished(output)
                if finished < before:
                    raise WrongError(f"{before} rows were finished, now {finished} are")
            check_complete(output, expected, names)
        except WrongError as wrong:
            counts["wrong"] += 1
            print(f"WRONG: job {number} (--seed {seed}): {wrong}", flush=True)
        counts["jobs"] += 1
        shutil.rmtree(output.parent)
        print(f" {counts['killed']} killed, {counts['jobs']} jobs complete", flush=True)
    return counts


def num_finished(output: Path) -> int:
    """Rows whose answers are on disk."""
    try:
        return read_run(output).num_finished_rows
    except OutputError:  # killed before it had begun
        return 0


def make_table(path: Path, num_rows: int) -> Path:
    """Texts that share beginnings, some of them the same, and a few that cannot be prompts."""
    texts = [
        None if i % 97 == 5 else f"Text number {i * 7 % 10} of a table. Item {i * 13 % 50}: "
        for i in range(num_rows)
    ]
    pq.write_table(pa.table({"id": range(num_rows), "text": texts}), path, row_group_size=500)
    return path


def import_all() -> None:
    """What a run imports, so that children need not."""
    for name in ("cli", "job", "report.summary", "runner.hash_runner", "attention.native"):
        importlib.import_module(f"batchllm.{name}")
    invoked = typer.testing.CliRunner().invoke(batchllm.cli.app, ["inspect", "/nowhere"])
    assert invoked.exit_code == 1, invoked.output  # the command line has imported its own


def preload_shim() -> None:
    """Start this very command again with the shim before the C library."""
    if os.environ.get("BATCHLLM_FAULT_SHIM"):
        return
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "shim.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SHIM, "-ldl"], check=True)
        environment = {"LD_PRELOAD": str(library), "BATCHLLM_FAULT_SHIM": "1"}
        done = subprocess.run(
            [sys.executable, *sys.argv], env=os.environ | environment, check=False
        )
    sys.exit(done.returncode)


def main() -> None:
    """Parse, prepare, run, count."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["operations", "kills"])
    parser.add_argument("--every", type=int, default=1, help="operations: only every n-th")
    parser.add_argument("--output", choices=OUTPUTS, default="both", help="operations: into what")
    parser.add_argument("--count", type=int, default=200, help="kills: how many")
    parser.add_argument("--model", default="fake", help="kills: fake, default, or any --model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.what == "operations":
        preload_shim()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        scratch = Path(os.path.realpath(folder))
        if options.what == "operations":
            counts = operations(options.every, OUTPUTS[options.output], scratch)
        else:
            counts = kills(options.count, options.model, options.seed, scratch)
    for name, number in sorted(counts.items()):
        print(f"{number:6,}  {name}")
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(1 if counts["wrong"] else 0)


if __name__ == "__main__":
    main()
