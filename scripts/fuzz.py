"""Fuzz what users and strangers hand in, and keep the count in FUZZING.md.

Random damage to Parquet files, models, tokenizers, templates, messages, schemas and options, each
case through the code that a job would take. Fine is what succeeds, what a row's error tells, and
what is refused in one line; all else is a finding: another exception, a hang, a process that died.

    .venv/bin/python scripts/fuzz.py --cases 100000
    .venv/bin/python scripts/fuzz.py --target gguf --seed 1234     one case again
"""

import argparse
import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fuzzing import driver, targets  # noqa: E402

PAGE = ROOT / "FUZZING.md"


def _record(name: str, tally: driver.Tally) -> None:
    """Put a target's counts into its row of the page."""
    counts = " | ".join(
        [
            *(f"{n:,}" for n in (tally.cases, tally.accepted, tally.refused, len(tally.findings))),
            f"{tally.seconds:,.0f}",
            datetime.date.today().isoformat(),
        ]
    )
    page = PAGE.read_text()
    # Its first row: what was found in it comes further down.
    row = re.compile(rf"^\| {name} \|.*$", re.MULTILINE)
    changed = row.sub(f"| {name} | {counts} |", page, count=1)
    PAGE.write_text(changed)


def main() -> None:
    """Run what the command line names; exit code 1 where there are findings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(targets.TARGETS), action="append")
    parser.add_argument("--cases", type=int, default=300, help="of each target")
    parser.add_argument("--first", type=int, default=0, help="the first case's seed")
    parser.add_argument("--seed", type=int, help="run this one case")
    parser.add_argument("--record", action="store_true", help="put the counts into FUZZING.md")
    options = parser.parse_args()
    first, cases = (options.first, options.cases) if options.seed is None else (options.seed, 1)
    found = False
    for name in options.target or targets.TARGETS:
        tally = driver.run(name, first, first + cases)
        print(
            f"{name}: {tally.cases:,} cases, {tally.refused:,} refused, {tally.accepted:,} "
            f"accepted, {len(tally.findings):,} findings, {tally.seconds:,.0f} s",
            flush=True,
        )
        for seed, report in tally.findings.items():
            print(f"  --target {name} --seed {seed}: {report}", flush=True)
        found = found or bool(tally.findings)
        if options.record:
            _record(name, tally)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
