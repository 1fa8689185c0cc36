"""The `blend` workload: rows that mostly prefill mixed with rows that mostly decode.

After BlendServe's synthesised mixes (arXiv 2411.16102): an evaluation set with few-shot heads that
many rows share and answers of a few tokens; conversations with the lengths of a published trace;
and generation with short prompts and answers of thousands of tokens. How many rows of each there
are sets how much computing there is per memory read; whether the heads are shared, how much can be
saved. Token ids are random, rows are shuffled.

    python datasets/blend.py out.parquet --mix compute-shared
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lengths import TRACES
from micro import FIRST_ORDINARY_ID, describe, token_table
from numpy.typing import NDArray

SUBJECTS = 57  # as many heads as MMLU has subjects
HEAD_TOKENS, QUESTION_TOKENS = 600, (40, 250)
GENERATION_PROMPT, GENERATION_OUTPUT = (200, 700), (800, 4000)


@dataclass(frozen=True, slots=True)
class Mix:
    """Rows of each kind, and whether rows of an evaluation subject share its head."""

    evaluation: int
    conversation: int
    generation: int
    shared: bool


MIXES = {
    "compute-shared": Mix(3000, 1500, 60, True),
    "compute-unshared": Mix(1500, 1500, 60, False),
    "memory-shared": Mix(3000, 1500, 600, True),
    "memory-unshared": Mix(1500, 1500, 600, False),
}


def build(mix: Mix, *, trace: str = "sharegpt", vocab: int = 49_152, seed: int = 0) -> pa.Table:
    """Makes the table of a mix."""
    rng = np.random.default_rng(seed)

    def tokens(count: int) -> NDArray[np.int32]:
        return rng.integers(FIRST_ORDINARY_ID, vocab, count, dtype=np.int32)

    heads = [tokens(HEAD_TOKENS) for _ in range(SUBJECTS)]
    prompts, outputs = [], []
    for row in range(mix.evaluation):
        head = heads[row % SUBJECTS] if mix.shared else tokens(HEAD_TOKENS)
        prompts.append(np.concatenate([head, tokens(int(rng.integers(*QUESTION_TOKENS)))]))
        outputs.append(int(rng.integers(1, 5)))
    lengths = pq.read_table(TRACES / f"{trace}.parquet").slice(0, mix.conversation)
    for prompt, output in zip(*(column.to_pylist() for column in lengths.columns), strict=True):
        prompts.append(tokens(max(prompt, 1)))
        outputs.append(max(output, 1))
    for _ in range(mix.generation):
        prompts.append(tokens(int(rng.integers(*GENERATION_PROMPT))))
        outputs.append(int(rng.integers(*GENERATION_OUTPUT)))
    order = rng.permutation(len(prompts)).tolist()
    return token_table(
        np.concatenate([prompts[row] for row in order]),
        np.array([len(prompts[row]) for row in order]),
        np.array([outputs[row] for row in order]),
    )


def main() -> None:
    """Command line: where to write, and the mix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="Parquet file to write")
    parser.add_argument("--mix", choices=sorted(MIXES), default="compute-shared")
    arguments = parser.parse_args()
    table = build(MIXES[arguments.mix])
    pq.write_table(table, arguments.out)
    print(f"{arguments.out}: {describe(table)}")


if __name__ == "__main__":
    main()
