"""A million rows through the whole path with the model `fake`, and memory watched all the way.

    pip install matplotlib && python scripts/soak.py --rows 1000000 --payload 10000 --plot soak.png

The table has prompts that share documents, and a column of random bytes that nothing asks for but
that has to come out again: with 10,000 a row, 10 GB, in row groups of a gigabyte (100,000 rows).
Prints the peak of resident memory, of the command and of its worker together; checks the output.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

GROUP_ROWS = 100_000
TEMPLATE = "{{ document }}\n\nQuestion {{ question }}:"


@dataclass(slots=True)
class Watched:
    """Resident memory in MiB by seconds, and what the command said when."""

    seconds: list[float] = field(default_factory=list)
    command: list[float] = field(default_factory=list)
    worker: list[float] = field(default_factory=list)
    notes: list[tuple[float, str]] = field(default_factory=list)

    @property
    def peak(self) -> float:
        return max(a + b for a, b in zip(self.command, self.worker, strict=True))


def make_table(path: Path, num_rows: int, payload: int) -> None:
    """Write the input, a row group at a time."""
    rng = np.random.default_rng(0)
    words = np.array(["red", "green", "blue", "seven", "eleven", "river", "mountain", "of", "and"])
    documents = [" ".join(rng.choice(words, 40)) for _ in range(max(num_rows // 100, 1))]
    schema = pa.schema(
        [
            ("id", pa.int64()),
            ("document", pa.string()),
            ("question", pa.int32()),
            ("payload", pa.binary(payload) if payload else pa.null()),
        ]
    )
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=["document"]) as writer:
        for start in range(0, num_rows, GROUP_ROWS):
            count = min(GROUP_ROWS, num_rows - start)
            chosen = rng.integers(0, len(documents), count)
            columns = [
                pa.array(np.arange(start, start + count)),
                pa.array([documents[i] for i in chosen]),
                pa.array(rng.integers(0, 1000, count, dtype=np.int32)),
                _payload(rng, count, payload),
            ]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=count)


def _payload(rng: np.random.Generator, count: int, size: int) -> pa.Array:
    if size == 0:
        return pa.nulls(count)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(size), count, [None, pa.py_buffer(rng.bytes(count * size))]
    )


def watch(words: list[str]) -> Watched:
    """Run a command to its end and look at it every half second."""
    watched = Watched()
    started = time.monotonic()
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:

        def listen() -> None:
            for line in process.stderr or ():
                watched.notes.append((time.monotonic() - started, line.rstrip()))
                print(line, end="", file=sys.stderr)

        listener = threading.Thread(target=listen)
        listener.start()
        command = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                here = command.memory_info().rss
                below = sum(child.memory_info().rss for child in command.children(recursive=True))
            except psutil.Error:  # it ended in between
                continue
            watched.seconds.append(time.monotonic() - started)
            watched.command.append(here / 2**20)
            watched.worker.append(below / 2**20)
            time.sleep(0.5)
        listener.join()
    if process.returncode != 0:
        sys.exit(f"exit code {process.returncode}")
    return watched


def plot(watched: Watched, path: Path, title: str) -> None:
    """Memory over time, with the notes that tell one phase from the next."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    axes.stackplot(
        watched.seconds,
        watched.command,
        watched.worker,
        labels=["command", "worker that makes prompts"],
        colors=["#4878a8", "#a8c8e8"],
    )
    top = 1.25 * watched.peak
    height = 0.97
    for seconds, note in watched.notes:
        for sign, shown in (
            ("sorting", "sorting"),
            (" rows, fake", "answering"),
            ("writing", "joining"),
        ):
            if sign in note:
                axes.axvline(seconds, color="#888888", linewidth=0.8)
                height = 1.87 - height  # two that are close must not cover each other
                axes.text(seconds, height * top, f" {shown}", va="top", color="#444444")
    axes.set(xlabel="seconds", ylabel="resident memory, MiB", title=title, ylim=(0, top))
    axes.set_xlim(0, watched.seconds[-1])
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Make the table, run, look, check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--payload", type=int, default=10_000, help="bytes a row")
    parser.add_argument("--kv-memory", default="64M")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        source, output = Path(folder) / "in.parquet", Path(folder) / "out.parquet"
        make_table(source, options.rows, options.payload)
        batchllm = [sys.executable, "-m", "batchllm.cli"]
        run = [*batchllm, "run", str(source), str(output), "--model", "fake"]
        run += ["--template", TEMPLATE, "--max-tokens", "16", "--kv-memory", options.kv_memory]
        watched = watch(run)
        size = source.stat().st_size / 1e9
        subprocess.run([*batchllm, "verify", str(output)], check=True)
    whole = [a + b for a, b in zip(watched.command, watched.worker, strict=True)]
    print(f"{options.rows:,} rows, {size:.1f} GB, {watched.seconds[-1]:.0f} s")
    for part in range(10):
        begin, end = (len(whole) * i // 10 for i in (part, part + 1))
        print(f"  {watched.seconds[begin]:6.0f} s  at most {max(whole[begin:end]):7.0f} MiB")
    print(f"peak {watched.peak:,.0f} MiB")
    if options.plot:
        plot(watched, options.plot, f"{options.rows:,} rows, {size:.1f} GB of Parquet, model fake")


if __name__ == "__main__":
    main()
