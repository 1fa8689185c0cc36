"""The `tree` workload: random token ids that are shared at several levels.

Level by level the tree has as many nodes, and each node as many tokens, as told; the nodes of the
last level are the rows. Rows are shuffled.

    python datasets/tree.py out.parquet --nodes 1 4 16 512 --tokens 1024 256 128 32
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from micro import FIRST_ORDINARY_ID, describe, token_table


def build(
    nodes: list[int], tokens: list[int], *, output: int = 32, vocab: int = 49_152, seed: int = 0
) -> pa.Table:
    """Makes the table; every node of a level has as many nodes below it as its neighbours.

    Raises:
        ValueError: the lists do not fit together.
    """
    if len(nodes) != len(tokens) or not nodes or min(*nodes, *tokens) < 1:
        raise ValueError("give as many node counts as token counts, all positive")
    if any(below % above for above, below in pairwise(nodes)):
        raise ValueError(f"node counts are {nodes}; each must be a multiple of the one above")
    rng = np.random.default_rng(seed)
    rows = nodes[-1]
    parts = []
    for count, length in zip(nodes, tokens, strict=True):
        level = rng.integers(FIRST_ORDINARY_ID, vocab, (count, length), dtype=np.int32)
        parts.append(level[np.arange(rows) * count // rows])
    prompts = np.concatenate(parts, axis=1)[rng.permutation(rows)]
    lengths = np.full(rows, prompts.shape[1])
    return token_table(prompts.reshape(-1), lengths, np.full(rows, output))


def main() -> None:
    """Command line: where to write, and the tree."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="Parquet file to write")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 4, 16, 512])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 256, 128, 32])
    parser.add_argument("--output", type=int, default=32)
    arguments = parser.parse_args()
    try:
        table = build(arguments.nodes, arguments.tokens, output=arguments.output)
    except ValueError as error:
        parser.error(str(error))
    pq.write_table(table, arguments.out)
    print(f"{arguments.out}: {describe(table)}")


if __name__ == "__main__":
    main()
