"""A sample of what `scripts/faults.py` does: faulty file operations, kills at random instants."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "faults.py"
pytestmark = pytest.mark.slow


def run(*words):
    command = [sys.executable, SCRIPT, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    return done.stdout


@pytest.mark.skipif(shutil.which("cc") is None, reason="the shim needs a C compiler")
def test_faulty_file_operations_lose_nothing():
    counts = run("operations", "--every", 127)
    assert "KILL_BEFORE: killed" in counts and "FULL: refused" in counts


def test_kills_lose_nothing():
    assert "killed" in run("kills", "--count", 4)
