"""The `micro` workload: groups of rows that share a prefix of random token ids.

Every group has its own prefix and every row its own ending, so that what can be shared is known
exactly and no row is a copy of another. Rows are shuffled: finding the groups is the engine's job.

    python datasets/micro.py out.parquet --shape 8x32
    python datasets/micro.py out.parquet --groups 4 --members 16 --prefix 1024 --own 64 --output 8
"""

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

FIRST_ORDINARY_ID = 20  # the ids below are special tokens in the models we measure with

SCHEMA = pa.schema(
    [
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("max_tokens", pa.int32(), nullable=False),
    ]
)
GROUP = pa.field("group", pa.int32(), nullable=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroShape:
    """Sizes of a micro workload, in rows and tokens.

    Each row's `max_tokens` is drawn evenly from `output`..`output_max` (both included), or is
    `output` where `output_max` is 0.

    Raises:
        ValueError: a size is out of range.
    """

    groups: int
    members: int
    prefix: int
    own: int
    output: int
    output_max: int = 0
    vocab: int = 49_152
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("groups", "members", "own", "output"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.prefix < 0:
            raise ValueError(f"prefix is {self.prefix}; it must be 0 or more")
        if self.output_max and self.output_max < self.output:
            raise ValueError(f"output_max is {self.output_max}, less than output {self.output}")
        if self.vocab <= FIRST_ORDINARY_ID:
            raise ValueError(f"vocab is {self.vocab}; it must be over {FIRST_ORDINARY_ID}")


SHAPES = {
    "8x32": MicroShape(groups=8, members=32, prefix=512, own=32, output=32),
    "4x16": MicroShape(groups=4, members=16, prefix=1024, own=64, output=8, output_max=128),
    "256x1": MicroShape(groups=256, members=1, prefix=0, own=256, output=32),
    # BatchLLM's own microbenchmark (arXiv 2412.03594), for a GPU.
    "400x16": MicroShape(groups=400, members=16, prefix=2000, own=200, output=100),
    # Not for timing: shows in seconds that an engine works.
    "tiny": MicroShape(groups=2, members=4, prefix=40, own=7, output=3, output_max=9),
}


def build(shape: MicroShape) -> pa.Table:
    """Makes the table of `shape`, its rows shuffled; equal shapes give equal tables."""
    rng = np.random.default_rng(shape.seed)
    rows = shape.groups * shape.members
    low, high = FIRST_ORDINARY_ID, shape.vocab
    prefixes = rng.integers(low, high, (shape.groups, shape.prefix), dtype=np.int32)
    endings = rng.integers(low, high, (rows, shape.own), dtype=np.int32)
    outputs = rng.integers(shape.output, shape.output_max or shape.output, rows, endpoint=True)
    order = rng.permutation(rows)
    group = np.repeat(np.arange(shape.groups, dtype=np.int32), shape.members)[order]
    tokens = np.concatenate([prefixes[group], endings[order]], axis=1)
    table = token_table(tokens.reshape(-1), np.full(rows, tokens.shape[1]), outputs[order])
    return table.append_column(GROUP, pa.array(group))


def token_table(
    tokens: NDArray[np.int32], lengths: NDArray[np.int64], outputs: NDArray[np.int64]
) -> pa.Table:
    """A table of prompts: `tokens` cut into `lengths`, and how long the answers are."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    token_ids = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
    return pa.Table.from_arrays([token_ids, pa.array(outputs.astype(np.int32))], schema=SCHEMA)


def count_distinct_prefixes(rows: list[NDArray[np.int32]]) -> int:
    """Counts the tokens left when each shared prefix is kept once.

    In sorted order a row adds what goes beyond its common prefix with the row before it.
    Big-endian bytes of non-negative int32 sort like the sequences themselves.
    """
    ordered = sorted(rows, key=lambda row: row.astype(">i4").tobytes())
    total = 0
    before = np.zeros(0, dtype=np.int32)
    for row in ordered:
        length = min(len(row), len(before))
        differs = np.flatnonzero(row[:length] != before[:length])
        total += len(row) - (int(differs[0]) if len(differs) else length)
        before = row
    return total


def describe(table: pa.Table) -> str:
    """States a workload's size in one line."""
    rows = [row.values.to_numpy() for row in table["token_ids"]]
    prompt = sum(len(row) for row in rows)
    shared = count_distinct_prefixes(rows)
    output = int(np.sum(table["max_tokens"].to_numpy()))
    return (
        f"{len(rows):,} rows, {prompt:,} prompt tokens, "
        f"{shared:,} after sharing ({1 - shared / prompt:.1%} saved), {output:,} output tokens"
    )


def parse_shape(arguments: argparse.Namespace) -> MicroShape:
    """Takes the named shape, if any, and lets the sizes that were given override it."""
    base = SHAPES[arguments.shape or "8x32"]
    given = {
        field.name: getattr(arguments, field.name)
        for field in fields(MicroShape)
        if getattr(arguments, field.name) is not None
    }
    return replace(base, **given)


def main() -> None:
    """Command line: where to write, and the shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="Parquet file to write")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="start from a named shape")
    for field in fields(MicroShape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int)
    arguments = parser.parse_args()
    try:
        shape = parse_shape(arguments)
    except ValueError as error:
        parser.error(str(error))
    table = build(shape)
    pq.write_table(table, arguments.out)
    print(f"{arguments.out}: {describe(table)}")


if __name__ == "__main__":
    main()
