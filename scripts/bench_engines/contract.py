"""What every engine under comparison is given and must say: one process, one JSON line an order.

Each `*_engine.py` runs in its own virtual environment, so this file needs pyarrow and nothing else.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as pq

ORDERS = ("shuffled", "sorted")
KV_CACHE_BYTES = 4 << 30  # what every engine that can be told gets, and what the bound assumes


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a workload, in the order in which an engine gets them."""

    prompts: list[list[int]]
    max_tokens: list[int]

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def read(cls, path: Path, order: str) -> "Rows":
        """Reads the workload: `shuffled` as it lies in the file, `sorted` by token ids."""
        table = pq.read_table(path, columns=["token_ids", "max_tokens"])
        pairs = list(
            zip(table["token_ids"].to_pylist(), table["max_tokens"].to_pylist(), strict=True)
        )
        if order == "sorted":
            pairs.sort()
        return cls([prompt for prompt, _ in pairs], [length for _, length in pairs])


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """One finished run. `load_seconds` is all before the first row: imports, weights, warm-up."""

    engine: str
    order: str
    load_seconds: float
    engine_seconds: float
    rows: int
    prompt_tokens: int
    output_tokens: int
    settings: dict[str, str | int | float | bool]


def warm_up_rows() -> Rows:
    """A few short rows that share nothing with any workload (but for chance)."""
    draw = random.Random("warm-up")
    prompts = [[draw.randrange(20, 49_152) for _ in range(64)] for _ in range(4)]
    return Rows(prompts, [8] * len(prompts))


def make_parser(
    description: str, *, model: str, needs_model: bool = True
) -> argparse.ArgumentParser:
    """The command line that all engines share; `model` says what this one wants to be given."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("workload", type=Path, help="Parquet file with token_ids and max_tokens")
    parser.add_argument("--model", type=Path, required=needs_model, help=model)
    parser.add_argument(
        "--order", nargs="+", choices=ORDERS, default=["shuffled"], help="one run for each"
    )
    parser.add_argument("--name", required=True, help="what its reports call this engine")
    parser.add_argument("--save-tokens", type=Path, help="write [prompt, output] pairs as JSON")
    return parser


def report(
    *,
    engine: str,
    order: str,
    load_seconds: float,
    engine_seconds: float,
    rows: Rows,
    outputs: Sequence[Sequence[int]],
    settings: dict[str, str | int | float | bool],
    save_tokens: Path | None,
) -> None:
    """Prints the run's JSON line, after making sure that the engine did the work asked of it.

    Raises:
        RuntimeError: a row has more or fewer output tokens than asked.
    """
    for index, (output, wanted) in enumerate(zip(outputs, rows.max_tokens, strict=True)):
        if len(output) != wanted:
            raise RuntimeError(f"{engine}: row {index} has {len(output)} tokens, not {wanted}")
    done = EngineReport(
        engine=engine,
        order=order,
        load_seconds=round(load_seconds, 3),
        engine_seconds=round(engine_seconds, 3),
        rows=len(rows),
        prompt_tokens=sum(map(len, rows.prompts)),
        output_tokens=sum(map(len, outputs)),
        settings=settings,
    )
    if save_tokens is not None:
        pairs = sorted(zip(rows.prompts, map(list, outputs), strict=True))
        save_tokens.write_text(json.dumps(pairs))
    print(json.dumps(asdict(done)), flush=True)
