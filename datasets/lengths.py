"""The `lengths` workload: prompts and answers as long as real ones, with sharing added.

Lengths are those of published conversation traces (`traces/`); token ids are random. Groups of 16
rows get a prefix of their own in front, as long as makes the wanted share of all prompt tokens
savable. Rows are shuffled.

    python datasets/lengths.py out.parquet --trace sharegpt --sharing 0.35
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from micro import FIRST_ORDINARY_ID, describe, token_table

TRACES = Path(__file__).parent / "traces"
MEMBERS = 16


def build(
    trace: str,
    *,
    sharing: float = 0.0,
    rows: int = 4096,
    longest_prompt: int | None = None,
    longest_output: int | None = None,
    vocab: int = 49_152,
    seed: int = 0,
) -> pa.Table:
    """Makes the table from the first `rows` of a trace, longer prompts and outputs cut.

    `longest_prompt` is without the shared prefix.

    Raises:
        ValueError: there is no such trace, or groups of 16 cannot share that much.
    """
    path = TRACES / f"{trace}.parquet"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in TRACES.glob("*.parquet")))
        raise ValueError(f"no trace named {trace!r}; there are: {known}")
    if not 0 <= sharing < (MEMBERS - 1) / MEMBERS:
        raise ValueError(f"sharing is {sharing}; it must be 0 or more, below 15/16")
    table = pq.read_table(path).slice(0, rows)
    prompt = np.clip(table["prompt_tokens"].to_numpy(), 1, longest_prompt).astype(np.int64)
    output = np.clip(table["output_tokens"].to_numpy(), 1, longest_output).astype(np.int64)
    rng = np.random.default_rng(seed)
    groups = -(-len(prompt) // MEMBERS)
    # Of a group's tokens, its own and 16 prefixes, 15 prefixes are saved.
    own = prompt.sum() / groups
    prefix = round(sharing * own / (MEMBERS - 1 - MEMBERS * sharing))
    heads = rng.integers(FIRST_ORDINARY_ID, vocab, (groups, prefix), dtype=np.int32)
    order = rng.permutation(len(prompt))
    rows_tokens = [
        np.concatenate(
            [heads[row // MEMBERS], rng.integers(FIRST_ORDINARY_ID, vocab, prompt[row], np.int32)]
        )
        for row in order.tolist()
    ]
    return token_table(np.concatenate(rows_tokens), prompt[order] + prefix, output[order])


def main() -> None:
    """Command line: where to write, which trace, how much sharing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="Parquet file to write")
    parser.add_argument("--trace", default="sharegpt")
    parser.add_argument("--sharing", type=float, default=0.0, help="share of prompt tokens, 0 to 1")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--longest-prompt", type=int, help="cut longer ones (before sharing)")
    parser.add_argument("--longest-output", type=int, help="cut longer ones")
    arguments = parser.parse_args()
    try:
        table = build(
            arguments.trace,
            sharing=arguments.sharing,
            rows=arguments.rows,
            longest_prompt=arguments.longest_prompt,
            longest_output=arguments.longest_output,
        )
    except ValueError as error:
        parser.error(str(error))
    pq.write_table(table, arguments.out)
    print(f"{arguments.out}: {describe(table)}")


if __name__ == "__main__":
    main()
