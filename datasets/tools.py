"""The `tools` workload: which of these functions answers the question?

Function descriptions and questions are those of the Berkeley Function Calling Leaderboard
(Apache-2.0), which the package `bfcl-eval` carries. The functions stand first in the prompt. In
the `live` sets several questions come with the same functions; in the others hardly any do, which
makes them a control: `simple_python`, `simple_java`, `simple_javascript`.

    pip download --no-deps --dest wheels bfcl-eval==2026.3.23
    python datasets/tools.py wheels/bfcl_eval-*.whl out.parquet --set live_multiple
"""

import argparse
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from describe_text import describe, shuffle, table_of

TEMPLATE = "{{ functions }}\n\n{{ question }}"

# Those with one turn and with the functions in the row itself.
SETS = (
    "irrelevance",
    "live_irrelevance",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_relevance",
    "live_simple",
    "multiple",
    "parallel",
    "parallel_multiple",
    "simple_java",
    "simple_javascript",
    "simple_python",
)

SCHEMA = pa.schema(
    [
        pa.field("functions", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("max_tokens", pa.int32(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
    ]
)


def question_text(messages: list[dict[str, str]]) -> str:
    """One turn as text; roles are named where somebody besides the user speaks."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def build(entries: list[dict[str, Any]], *, max_tokens: int = 64, seed: int = 0) -> pa.Table:
    """Makes the table of a set's entries, shuffled."""
    rows: list[tuple[str | int, ...]] = [
        (
            json.dumps(entry["function"], ensure_ascii=False),
            question_text(entry["question"][0]),
            max_tokens,
            entry["id"],
        )
        for entry in entries
    ]
    return shuffle(table_of(rows, SCHEMA), seed)


def read_set(wheel: Path, name: str) -> list[dict[str, Any]]:
    """Reads a set out of the wheel, which holds one entry a line.

    Raises:
        ValueError: the wheel has no such set.
    """
    found = [p for p in zipfile.Path(wheel, "bfcl_eval/data/").iterdir() if is_set(p.name, name)]
    if len(found) != 1:
        raise ValueError(f"{wheel} has {len(found)} sets named {name!r}; is it bfcl-eval's wheel?")
    return [json.loads(line) for line in found[0].read_text(encoding="utf-8").splitlines()]


def is_set(file: str, name: str) -> bool:
    """Whether `file` is called like BFCL_v4_NAME.json, of whichever version."""
    parts = file.removesuffix(".json").split("_", 2)
    return file.endswith(".json") and len(parts) == 3 and parts[0] == "BFCL" and parts[2] == name


def main() -> None:
    """Command line: the wheel, where to write, and the set."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path, help="wheel of the package bfcl-eval")
    parser.add_argument("out", type=Path, help="Parquet file to write")
    parser.add_argument("--set", choices=SETS, default="live_multiple")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        entries = read_set(arguments.wheel, arguments.set)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        parser.error(str(error))
    table = build(entries, max_tokens=arguments.max_tokens, seed=arguments.seed)
    pq.write_table(table, arguments.out, compression="zstd")
    print(f"{arguments.out}: {describe(table, TEMPLATE)}")


if __name__ == "__main__":
    main()
