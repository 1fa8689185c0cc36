"""How long planning takes, and how much memory: token ids to ordered groups.

Each case runs in a process of its own, so that its peak memory is its own; the tokens are made in
the shape of a workload, shuffled. Time is from token ids to the order of the leaves (policy
`ratio`); memory is the peak above what the tokens themselves take, in multiples of these.

    .venv/bin/python scripts/bench_plan.py --rows 10000 100000 1000000
"""

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.plan import plan_tokens
from batchllm.request import RaggedTokens, SamplingParams

VOCAB = 49_152
# Levels as (rows below one node of it, tokens): a level with 1 row a node is the rows' own part.
SHAPES: dict[str, list[tuple[int, int]]] = {
    "classify": [(10**9, 370), (1, 130)],
    "tree": [(10**9, 200), (4096, 120), (256, 80), (16, 60), (1, 40)],
    "tools": [(64, 310), (1, 190)],
    "unshared": [(1, 500)],
}


def make(shape: str, rows: int, seed: int = 0) -> RaggedTokens:
    """Random tokens of a shape, rows shuffled; own parts vary in length by a fifth."""
    rng = np.random.default_rng(seed)
    levels = SHAPES[shape]
    order = rng.permutation(rows)
    own = levels[-1][1]
    own_lengths = rng.integers(own - own // 5, own + own // 5 + 1, rows)
    head = sum(tokens for _, tokens in levels[:-1])
    offsets = np.concatenate([[0], np.cumsum(head + own_lengths)])
    values = rng.integers(20, VOCAB, int(offsets[-1]), dtype=np.int32)
    begin = 0
    for members, tokens in levels[:-1]:
        nodes: NDArray[np.int64] = order // members
        level = rng.integers(20, VOCAB, (int(nodes.max()) + 1, tokens), dtype=np.int32)
        for column in range(tokens):
            values[offsets[:-1] + begin + column] = level[nodes, column]
        begin += tokens
    return RaggedTokens(values, offsets)


def run_case(shape: str, rows: int) -> None:
    """Plan once; print seconds, seconds a million tokens, memory over the tokens' own."""
    tokens = make(shape, rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    plan = plan_tokens(tokens, [SamplingParams()], policy="ratio")
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    count = len(tokens.values)
    saved = 1 - plan.tree.num_distinct_prefixes / count
    memory = (peak - before) / tokens.values.nbytes
    print(
        f"| {shape} | {rows:,} | {count / 1e6:.1f} | {saved:.1%} | {plan.tree.num_nodes:,} "
        f"| {seconds:.2f} | {seconds / count * 1e9:.1f} | {memory:.2f} |",
        flush=True,
    )


def main() -> None:
    """Run every shape at every size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--case", nargs=2, metavar=("SHAPE", "ROWS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run_case(arguments.case[0], int(arguments.case[1]))
        return
    print("| shape | rows | Mtokens | saved | nodes | seconds | ns/token | memory over tokens |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for shape in arguments.shapes:
        for rows in arguments.rows:
            subprocess.run([sys.executable, __file__, "--case", shape, str(rows)], check=True)


if __name__ == "__main__":
    main()
