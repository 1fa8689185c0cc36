"""Runs a target's cases in child processes, and goes on behind a case that took its process."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

CASE_SECONDS, MEMORY_BYTES = 20, 1 << 30
_TESTS = Path(__file__).parents[1]


@dataclass
class Tally:
    """What came of a target's cases; `findings` is by seed."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: dict[int, str] = field(default_factory=dict)


def run(name, first, last, *, case_seconds=CASE_SECONDS, memory=MEMORY_BYTES):
    """Run the cases of seeds `first` to `last` (not included)."""
    tally = Tally()
    started = time.monotonic()
    while first < last:
        first = _run_child(name, first, last, tally, case_seconds, memory)
    tally.seconds = time.monotonic() - started
    return tally


def _run_child(name, first, last, tally, case_seconds, memory):
    """One child's work; returns the seed to go on with."""
    command = [sys.executable, "-m", "fuzzing.child", name]
    command += map(str, (first, last, case_seconds, memory))
    environment = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(_TESTS.parent), str(_TESTS)]),
    }
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        errors="replace",
    ) as child:  # fmt: skip
        answers, complaints = child.communicate()
    seed = first - 1
    for line in answers.splitlines():
        seed, _, rest = line.partition(" ")
        seed = int(seed)
        tally.cases += 1
        letter, _, report = rest.partition(" ")
        if letter == "a":
            tally.accepted += 1
        elif letter == "r":
            tally.refused += 1
        else:
            died = f"the process ended with {child.returncode}: {_last_words(complaints)}"
            tally.findings[seed] = json.loads(report) if letter == "f" else died
    if seed < first:
        raise RuntimeError(f"target {name} did not start: {_last_words(complaints)}")
    return seed + 1


def _last_words(complaints):
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    return " < ".join(line for line in lines[-40:] if "site-packages" not in line)[:1500]
