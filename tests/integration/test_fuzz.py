"""A hundred cases or two of every fuzz target; `scripts/fuzz.py` runs more."""

import pytest
from fuzzing import driver, targets

pytestmark = pytest.mark.slow
CASES = {"options": 50, "gguf": 75, "safetensors": 75, "row-template": 100, "chat-template": 100}


@pytest.mark.parametrize("name", targets.TARGETS)
def test_nothing_but_success_and_refusals(name):
    cases = CASES.get(name, 200)
    tally = driver.run(name, 0, cases)
    assert not tally.findings
    assert tally.cases == cases
    assert tally.refused or name == "messages"
    assert tally.accepted


def test_a_finding_is_found():
    """The driver tells what ended a process, what hung, and what another error was."""
    tally = driver.run("bad", 0, 8, case_seconds=2)
    assert tally.cases == 8
    assert {seed: report.split(" ")[0] for seed, report in tally.findings.items()} == {
        **{1: "ZeroDivisionError:", 2: "the", 3: "the", 4: "MemoryError:", 5: "LongError"},
        6: "SystemExit:",
    }
    assert "Timeout" in tally.findings[3]
