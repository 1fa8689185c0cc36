"""Progress: what it counts, and how long it says is left."""

import io

import numpy as np
import pytest

from batchllm.prefix.plan import plan_tokens
from batchllm.progress import Progress, duration
from batchllm.request import RaggedTokens, SamplingParams


class FakeBatch:
    """A step of some tokens."""

    def __init__(self, num_tokens):
        self.num_tokens = num_tokens
        self.num_steps = 1


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("batchllm.progress.time.monotonic", lambda: now[0])
    return now


def step(progress, clock, num_tokens):
    """Ten seconds pass; returns the line that is shown."""
    clock[0] += 10
    progress.on_step(FakeBatch(num_tokens))
    return progress._stream.getvalue().splitlines()[-1]


def test_the_time_left_goes_by_tokens_in_a_window_and_by_rows_beyond(clock):
    plan = plan_tokens(
        RaggedTokens.from_sequences([np.arange(i, i + 90) for i in range(4)]),
        [SamplingParams(max_tokens=10)],
    )
    assert plan.tree.num_tokens == 360
    progress = Progress(8, stream=io.StringIO())
    progress.start_window(plan)
    assert "0/8 rows (0%)  10 tokens/s" in step(progress, clock, 100)
    # 100 of 400 tokens of half the rows are an eighth of everything
    assert progress._stream.getvalue().splitlines()[-1].endswith("1m 10s left")
    progress.finish_rows(4)
    assert step(progress, clock, 100).endswith("20s left")  # ended early: half is done
    progress.start_window(plan)
    assert step(progress, clock, 200).endswith("10s left")  # 30s for six of eight rows' worth


def test_rows_of_an_earlier_run_took_no_time(clock):
    progress = Progress(10, done_rows=5, stream=io.StringIO())
    assert step(progress, clock, 1).endswith("time left unknown yet")
    progress.finish_rows(1)
    assert step(progress, clock, 1).endswith("1m 20s left")


@pytest.mark.parametrize(
    ("seconds", "text"), [(42.4, "42s"), (200, "3m 20s"), (7500, "2h 05m"), (59.6, "1m 00s")]
)
def test_durations_read_as_a_person_says_them(seconds, text):
    assert duration(seconds) == text
