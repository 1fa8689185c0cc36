"""Replicas: every row once whoever dies, what is said on the way, and nobody left behind."""

import pickle
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from process_checks import gone, hard_limit, tests_on_path

from batchllm.config import EngineConfig
from batchllm.errors import (
    OutOfMemoryError,
    WorkerCrashedError,
    WorkerError,
    WorkerKilledError,
)
from batchllm.metrics import Metrics
from batchllm.replicas import Replicas
from batchllm.request import Request, SamplingParams
from batchllm.scheduler.factory import SchedulerLimits
from batchllm.simulate.cost import CostModel
from batchllm.simulate.machine import MACHINES
from batchllm.simulate.shape import get_shape
from batchllm.watch import Watch

pytestmark = pytest.mark.usefixtures(hard_limit.__name__, tests_on_path.__name__)

COSTS = CostModel(MACHINES["cpu"], get_shape("smollm2-135m"))
LIMITS = SchedulerLimits(
    num_blocks=303, block_size=16, max_model_len=99, max_num_batched_tokens=64, max_num_seqs=32
)
# Six groups of ten; row numbers go up in threes, and not in the order of the prompts.
REQUESTS = [
    Request(
        3 * i,
        np.array([i % 6] * 20 + [i], np.int32),
        SamplingParams(max_tokens=1 + i % 4, seed=i % 2),
    )
    for i in range(60)
]


@dataclass
class Seen:
    """Looks on, and remembers."""

    plans: int = 0
    tokens: int = 0
    rows: int = 0
    notes: list[str] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    in_flight: list[list[int]] = field(default_factory=list)

    def start_window(self, plan):
        self.plans += 1
        assert plan.tree.num_leaves == len(REQUESTS)

    def add_tokens(self, count):
        self.tokens += count

    def finish_rows(self, count):
        self.rows += count

    def note(self, text):
        self.notes.append(text)

    def watch(self, should_stop=lambda: False):
        return Watch(
            progress=self,
            keep=lambda outputs: self.kept.extend(output.row_index for output in outputs),
            should_stop=should_stop,
            before_step=lambda rows: self.in_flight.append(rows.tolist()),
        )


@dataclass
class Named:
    path: Path = Path("no model")


@contextmanager
def started(monkeypatch, fates="", count=3):
    monkeypatch.setenv("TEST_REPLICAS", fates)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("batchllm.replicas._REPLICA", "stub_replica")
    before = psutil.Process().children()
    replicas = Replicas(Named(), EngineConfig(data_parallel_size=count))
    try:
        yield replicas
    finally:
        processes = [p for p in psutil.Process().children() if p not in before]
        replicas.close()
        assert gone(processes)


def check(outputs, requests=REQUESTS):
    assert sorted(o.row_index for o in outputs) == [r.row_index for r in requests]
    asked = {request.row_index: request for request in requests}
    for one in outputs:
        request = asked[one.row_index]
        assert one.text == str(request.prompt_token_ids.sum())
        assert len(one.output_token_ids) == request.sampling_params.max_tokens


def test_all_is_answered_and_told(monkeypatch):
    with started(monkeypatch) as replicas:
        assert (replicas.loaded.num_blocks, replicas.loaded.wanted_blocks) == (303, 330)
        assert replicas.loaded.threads.count == 3  # how many shares the machine is divided into
        for _ in range(2):
            seen = Seen()
            answers = replicas.answer(REQUESTS, LIMITS, COSTS, seen.watch())
            check(answers.outputs)
            assert sorted(seen.kept) == sorted(o.row_index for o in answers.outputs)
            assert (seen.plans, seen.rows, seen.tokens) == (1, 60, 30 * 10)
            assert sorted(seen.notes) == [f"replica {i}: 20 rows, 32 at once" for i in (1, 2, 3)]
            assert {row for rows in seen.in_flight for row in rows} == set(seen.kept)
            assert max(map(len, seen.in_flight)) > 2 or len(seen.in_flight) == 30
            assert answers.policies == {"dfs"}
            # Sums, but for a time, which passes for all at once, and windows, of which this is one.
            assert answers.metrics == Metrics(rows=60, steps=9, peak_kv_blocks=21)


@pytest.mark.parametrize(
    ("fates", "dead"), [("1 dies 9 of 4", [2]), ("0 dies 15 of 0,2 dies 9 of 9", [1, 3])]
)
def test_what_a_killed_one_leaves_is_answered_by_the_others(monkeypatch, fates, dead):
    with started(monkeypatch, fates) as replicas:
        seen = Seen()
        answers = replicas.answer(REQUESTS, LIMITS, COSTS, seen.watch())
        check(answers.outputs)
        assert sorted(seen.kept) == sorted(o.row_index for o in answers.outputs)
        assert (seen.plans, seen.rows, answers.metrics.rows) == (1, 60, 60)
        told = [note for note in seen.notes if "was ended from outside" in note]
        assert sorted(int(note.split()[1]) for note in told) == dead
        again = Seen()
        check(replicas.answer(REQUESTS, LIMITS, COSTS, again.watch()).outputs)
        assert len(again.notes) == 3 - len(dead)


def test_few_rows_do_with_few_replicas_one_at_a_time_means_one_and_the_idle_may_die(monkeypatch):
    with started(monkeypatch) as replicas:
        check(replicas.answer(REQUESTS[:2], LIMITS, COSTS, Watch()).outputs, REQUESTS[:2])
        assert replicas.answer([], LIMITS, COSTS, Watch()).outputs == []
        seen = Seen()
        alone = replace(LIMITS, max_num_seqs=1)
        check(replicas.answer(REQUESTS, alone, COSTS, seen.watch()).outputs)
        assert seen.notes == ["replica 1: 60 rows, 1 at once"]
        psutil.Process(replicas._alive[1].child.pid).kill()
        check(replicas.answer(REQUESTS, LIMITS, COSTS, Watch()).outputs)


def test_the_last_one_is_told_of(monkeypatch):
    with started(monkeypatch, "0 dies 9 of 0,1 dies 9 of 3", 2) as replicas:
        with pytest.raises(WorkerKilledError, match="was ended from outside"):
            replicas.answer(REQUESTS, LIMITS, COSTS, Watch())
        with pytest.raises(WorkerError, match="have been ended"):
            replicas.answer(REQUESTS, LIMITS, COSTS, Watch())


def test_a_crash_ends_the_work_and_says_what_was_in_flight(monkeypatch):
    with started(monkeypatch, "1 dies 11 of 4", 2) as replicas:
        seen = Seen()
        with pytest.raises(WorkerCrashedError, match=r"replica 2 crashed \(Segm") as told:
            replicas.answer(REQUESTS, LIMITS, COSTS, seen.watch())
        assert len(told.value.rows) == 2 and not set(told.value.rows) & set(seen.kept)
        assert any(set(told.value.rows) <= set(rows) for rows in seen.in_flight)
        assert pickle.loads(pickle.dumps(told.value)).rows == told.value.rows
        with pytest.raises(WorkerError, match="have been ended"):
            replicas.answer(REQUESTS, LIMITS, COSTS, Watch())


def test_an_error_ends_the_work_as_it_is(monkeypatch):
    with started(monkeypatch, "0 fails 2", 2) as replicas:
        with pytest.raises(OutOfMemoryError, match="no memory here"):
            replicas.answer(REQUESTS, LIMITS, COSTS, Watch())
        with pytest.raises(WorkerError, match="have been ended"):
            replicas.answer(REQUESTS, LIMITS, COSTS, Watch())


def test_a_stop_lets_each_end_its_step_and_the_next_window_is_whole(monkeypatch):
    with started(monkeypatch, "1 waits") as replicas:
        seen = Seen()
        watch = seen.watch(should_stop=lambda: len(seen.kept) >= 20)
        outputs = replicas.answer(REQUESTS, LIMITS, COSTS, watch).outputs
        assert 20 <= len(outputs) <= 40
        assert sorted(o.row_index for o in outputs) == sorted(seen.kept)
    with started(monkeypatch, count=2) as replicas:
        assert (
            replicas.answer(REQUESTS, LIMITS, COSTS, Watch(should_stop=lambda: True)).outputs == []
        )
        seen = Seen()
        replicas.answer(REQUESTS, LIMITS, COSTS, seen.watch(should_stop=lambda: seen.rows > 0))
        check(replicas.answer(REQUESTS, LIMITS, COSTS, Watch()).outputs)


def test_one_that_cannot_start_ends_the_others(monkeypatch):
    monkeypatch.setattr("batchllm.replicas._REPLICA", "nowhere_to_be_found")
    with pytest.raises(WorkerError, match="replica 1 ended with exit code 1"):
        Replicas(Named(), EngineConfig(data_parallel_size=2))
    assert gone(psutil.Process().children())


def test_an_interrupted_answer_leaves_nobody_at_work(monkeypatch):
    with started(monkeypatch, "0 waits", 2) as replicas:

        def interrupt(rows):
            raise KeyboardInterrupt

        processes = psutil.Process().children()
        with pytest.raises(KeyboardInterrupt):
            replicas.answer(REQUESTS, LIMITS, COSTS, Watch(before_step=interrupt))
        assert gone(processes)
