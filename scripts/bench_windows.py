"""What windows lose of a table's sharing: by prefix, as a run chooses them, and by row order.

Each table is planned whole, in windows by prefix, and in as many windows of consecutive rows; the
share lost is of what planning it whole saves. Text workloads come from scripts/text_workloads.sh
and are shuffled here; the others are made here.

    .venv/bin/python scripts/bench_windows.py [--windows 8]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from simulate import PAPER, TEMPLATES

from batchllm.io.parquet import ParquetInput
from batchllm.models.checkpoint import open_checkpoint
from batchllm.models.locate import resolve
from batchllm.prefix.tree import build_tree
from batchllm.request import RaggedTokens
from batchllm.text.prompts import PromptBuilder, PromptSpec
from batchllm.windows import Windows

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "datasets"))
import micro  # noqa: E402
import tree  # noqa: E402


@dataclass(slots=True)
class Count:
    """Prompt tokens, end to end and in the windows' trees."""

    prompt: int = 0
    computed: int = 0

    def add(self, tokens: RaggedTokens) -> None:
        """Count a window."""
        keys = np.zeros(len(tokens), dtype=np.int64)
        self.prompt += len(tokens.values)
        self.computed += build_tree(tokens, keys).num_distinct_prefixes


def tables() -> Iterator[tuple[str, pa.Table, PromptSpec]]:
    """Each workload, its rows in a random order."""
    for name, template in TEMPLATES.items():
        table = pq.read_table(ROOT / ".bench" / "data" / f"{name}.parquet")
        order = np.random.default_rng(0).permutation(table.num_rows)
        yield name, table.take(pa.array(order)), PromptSpec(template=template)
    ids = PromptSpec(token_ids_column="token_ids")
    yield "micro (400 groups of 16)", micro.build(PAPER), ids
    yield "tree", tree.build([1, 4, 64, 1024, 16384], [512, 256, 128, 64, 32]), ids


def measure(table: pa.Table, spec: PromptSpec, num_windows: int) -> list[str]:
    """The columns of one row of the table."""
    checkpoint = open_checkpoint(resolve(None))
    builder = PromptBuilder(spec, checkpoint.tokenizer(), 1 << 20)
    size = -(-table.num_rows // num_windows)
    whole, by_prefix, by_row = Count(), Count(), Count()
    whole.add(builder.build(table).tokens)
    for start in range(0, table.num_rows, size):
        by_row.add(builder.build(table.slice(start, size)).tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.parquet"
        pq.write_table(table, path)
        wanted = np.ones(table.num_rows, dtype=np.bool_)
        started = time.perf_counter()
        windows = Windows(
            ParquetInput(path), builder, wanted, window_rows=size, scratch=Path(folder) / "spool"
        )
        seconds = time.perf_counter() - started
        with closing(windows):
            largest = 0
            for window in windows:
                largest = max(largest, len(window.rows.index))
                by_prefix.add(builder.build(window.rows.table).tokens)
    saved = whole.prompt - whole.computed
    lost = [(count.computed - whole.computed) / saved for count in (by_prefix, by_row)]
    said = windows.repeated_tokens / saved
    return [
        f"{table.num_rows:,}",
        f"{windows.count}",
        f"{largest / size:.2f}",
        f"{saved / whole.prompt:.1%}",
        f"{lost[0]:.2%}",
        f"{said:.2%}",
        f"{lost[1]:.1%}",
        f"{seconds:.1f}",
    ]


def main() -> None:
    """Command line: into how many windows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=8)
    arguments = parser.parse_args()
    print(
        "| workload | rows | windows | largest ÷ asked | saved whole | lost by prefix | as counted "
        "| lost by row | seconds |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for name, table, spec in tables():
        print(f"| {name} | {' | '.join(measure(table, spec, arguments.windows))} |", flush=True)


if __name__ == "__main__":
    main()
