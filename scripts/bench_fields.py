"""What the order of an object's fields saves, and how long it takes to find: `table` workload.

The prompt is a question and the row as a JSON object. Tokens are the default model's, with its chat
template, and all rows are planned together. Learning is in CPU seconds, from at most 65,536 rows;
ordering is applying what was learned to all rows.

    .venv/bin/python scripts/bench_fields.py --rows 10000 28000 100000
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from batchllm.models.checkpoint import Checkpoint, open_checkpoint
from batchllm.models.locate import resolve
from batchllm.prefix.fields import best_order
from batchllm.report.plan import PlanReport, add_window, read_prompts
from batchllm.text.field_order import LEARNING_ROWS, ColumnRules, learn_field_order, spread
from batchllm.text.field_values import as_json_field, printed_values
from batchllm.text.prompt_spec import PromptSpec
from batchllm.text.prompts import PromptBuilder

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "datasets"))
import table as workload  # noqa: E402


def main() -> None:
    """Print the table of BENCHMARKS.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 28_000, 100_000])
    parser.add_argument("--kinds", nargs="+", choices=sorted(workload.KINDS), default=None)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(resolve(None))
    print("| table | rows | Mtokens | as given | best fixed | by row | learning s | ordering s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for name in arguments.kinds or sorted(workload.KINDS):
        for rows in arguments.rows:
            measure(name, rows, checkpoint)


def measure(name: str, rows: int, checkpoint: Checkpoint) -> None:
    """Print one line."""
    kind = workload.KINDS[name]
    table = workload.build(kind, rows=rows)
    spec = PromptSpec(template=template(kind, kind.columns), reorder_fields=True)
    started = time.process_time()
    rules = learn_field_order(spec, [table], rows)
    learned = time.process_time()
    assert rules is not None
    rules.orders(table)
    ordered = time.process_time()
    fixed = PromptSpec(template=template(kind, fixed_order(table, kind.columns)))
    given = planned(spec, table, checkpoint)
    shares = (given, planned(fixed, table, checkpoint), planned(spec, table, checkpoint, rules))
    saved = " | ".join(f"{report.saved_share:.1%}" for report in shares)
    print(
        f"| {name} | {rows:,} | {given.prompt_tokens / 1e6:.1f} | {saved} "
        f"| {learned - started:.2f} | {ordered - learned:.2f} |",
        flush=True,
    )


def template(kind: workload.Kind, columns: Sequence[str]) -> str:
    """The question, then these columns as an object."""
    names = ", ".join(f'"{name}"' for name in columns)
    return f"{kind.question}\n{{{{ row[{names}] | tojson }}}}"


def fixed_order(table: pa.Table, columns: Sequence[str]) -> list[str]:
    """The order that is best for all rows, found from those that rules are learned from."""
    sample = table.take(pa.array(spread(table.num_rows, LEARNING_ROWS)))
    fields = [as_json_field(n, printed_values(sample[n]), sample[n].type) for n in columns]
    return [field.name for field in best_order(fields)]


def planned(
    spec: PromptSpec, table: pa.Table, checkpoint: Checkpoint, rules: ColumnRules | None = None
) -> PlanReport:
    """What `batchllm plan` counts."""
    tokenizer = checkpoint.tokenizer()
    length = checkpoint.config.max_position_embeddings
    builder = PromptBuilder(spec, tokenizer, length, field_rules=rules)
    report = PlanReport()
    for prompts in read_prompts([table], builder, 1, report):
        add_window(report, prompts, tokenizer)
    return report


if __name__ == "__main__":
    main()
