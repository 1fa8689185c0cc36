"""Choosing again in the middle of a window, and rearranging who waits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import (
    EOS,
    MAX_MODEL_LEN,
    ROWS,
    CheckingEngine,
    driver,
    expected_answer,
    requests,
)
from simulating import SHAPE, SIDE_BY_SIDE

from batchllm import LLM, SamplingParams
from batchllm.cache.block_counts import BlockCounts
from batchllm.cache.block_pool import BlockPool
from batchllm.prefix.plan import PrefixPlan, plan_requests, plan_tokens
from batchllm.request import RaggedTokens
from batchllm.runner.fake_runner import FakeRunner
from batchllm.scheduler.factory import SchedulerLimits, make_scheduler
from batchllm.scheduler.lengths import LengthEstimator
from batchllm.scheduler.scheduler import Scheduler
from batchllm.simulate import choose, second_look
from batchllm.simulate.choose import Choice
from batchllm.simulate.cost import CostModel
from batchllm.simulate.second_look import SecondLook
from batchllm.simulate.simulator import END_TOKEN, simulate


@given(rows=ROWS, seed=st.integers(0, 999), spare=st.integers(0, 30), ahead=st.booleans())
@settings(max_examples=100)
def test_whoever_waits_may_be_rearranged_at_any_time(rows, seed, spare, ahead):
    rng, reqs = np.random.default_rng(seed), requests(rows)
    plan = plan_requests(reqs, policy="dfs")
    pool = BlockPool(10 + spare, 4)
    scheduler = Scheduler(
        pool, max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=12, max_num_seqs=5,
        eos_token_ids=EOS,
    )  # fmt: skip
    scheduler.lengths.observe(np.ones(30, int), np.full(30, 16))  # too short: some are preempted
    engine = CheckingEngine(scheduler, driver(FakeRunner(10 + spare, 4), ahead=ahead))
    answers = {}
    for finished in engine.steps(plan):
        answers |= {sequence.leaf: sequence for sequence in finished}
        order, step_tokens = rng.permutation(plan.tree.num_leaves), int(rng.integers(1, 20))
        before = set(scheduler.leaves_not_begun().tolist())
        scheduler.rearrange(replaced(plan, order, step_tokens))
        assert scheduler.leaves_not_begun().tolist() == [i for i in order.tolist() if i in before]
    assert pool.num_used == 0
    for leaf in range(plan.tree.num_leaves):
        prompt, max_tokens = rows[plan.tree.leaf_row[leaf]]
        assert answers[leaf].output_token_ids.tolist() == expected_answer(prompt, max_tokens)


def replaced(plan, order, step_tokens):
    fields = {name: getattr(plan, name) for name in PrefixPlan.__dataclass_fields__}
    return PrefixPlan(**fields | {"leaf_order": order, "step_tokens": step_tokens})


class Window:
    """300 rows that may have 90 tokens and have about 5, with nothing known of that."""

    def __init__(self, count=300):
        prompts = [[i // 20, *[7] * 9, i] for i in range(count)]
        params = [SamplingParams(max_tokens=90)]
        self.plan = plan_tokens(RaggedTokens.from_sequences(prompts), params, policy="dfs")
        self.ends = np.random.default_rng(1).integers(2, 9, count)
        self.limits = SchedulerLimits(
            num_blocks=200, block_size=4, max_model_len=200, max_num_batched_tokens=64,
            max_num_seqs=20,
        )  # fmt: skip
        self.scheduler = make_scheduler(
            "auto", self.limits, frozenset({END_TOKEN}), holder=BlockCounts
        )
        self.chosen = set()
        self.costs = CostModel(SIDE_BY_SIDE, SHAPE)
        self.look = SecondLook(self.plan, self.scheduler, self.limits, self.costs, self.chosen)

    def run(self, after_step=lambda num_ended: None):
        """Run it; `after_step` is told how many answers have ended, after the look."""

        def on_ended(num_ended):
            self.look.after_step(num_ended)
            after_step(num_ended)

        return simulate(self.plan, self.ends, self.scheduler, self.costs, on_ended)


def test_a_tenth_is_waited_for_and_what_is_chosen_holds_from_then_on(monkeypatch):
    window, asked = Window(), []

    def choose(plan, expected, limits, costs, *, outputs, knows):
        assert knows
        asked.append((plan.tree.num_leaves, float(expected.mean()), float(outputs.mean())))
        return Choice("ratio", step_tokens=24)

    monkeypatch.setattr(second_look, "choose_policy", choose)

    def check(num_ended):
        if num_ended < 64:  # a tenth would be thirty, which is too few to know anything by
            assert not asked and window.look._choosing is None
        if window.chosen:
            waiting = window.scheduler.leaves_not_begun()
            in_order = Choice("ratio").order(window.plan, np.full(300, 1)).leaf_order
            assert waiting.tolist() == [i for i in in_order.tolist() if i in set(waiting.tolist())]
            assert window.scheduler._admission.step_tokens == 24
        else:
            assert num_ended < 90

    window.run(check)
    assert window.chosen == {"ratio, 24 tokens a step"}
    ((rest, expected, drawn),) = asked  # once, for the others, with lengths as they are
    assert 180 < rest < 300 - 64
    assert 3 < expected < 9 and 3 < drawn < 9


def test_the_same_window_is_run_in_the_same_steps_again():
    first, second = (Window().run() for _ in range(2))
    assert first == second


def test_a_window_where_all_have_begun_goes_on_as_it_is():
    window = Window(count=15)
    window.run()
    assert not window.chosen


@pytest.mark.parametrize(
    ("so_far", "chances"),
    [
        ([], {10: 2 / 4, 30: 1 / 4, 60: 1 / 4}),
        # Of those that got as far as 30, three did and one ended there; of the last two, one.
        ([20, 40, 20], {10: 2 / 7, 30: 5 / 7 / 3, 60: 5 / 7 * 2 / 3}),
        (
            [80],
            {10: 2 / 5, 30: 1 / 5, 60: 1 / 5, 100: 1 / 5},
        ),  # goes on for as long again, if it may
    ],
)
def test_answers_that_have_not_ended_are_made_up_for(so_far, chances):
    prompts = [[i // 100, i % 100, 5] for i in range(20_000)]
    params = [SamplingParams(max_tokens=100)]
    plan = plan_tokens(RaggedTokens.from_sequences(prompts), params, policy="dfs")
    lengths = LengthEstimator()
    lengths.observe(np.array([10, 30, 10, 60] * 8), np.full(32, 100))
    drawn = lengths.drawn(plan, np.array(so_far * 8) / 100)
    found = {int(n): (drawn == n).mean() for n in np.unique(drawn)}
    assert found == pytest.approx(chances, abs=0.02)


def test_a_table_is_answered_alike_whatever_is_chosen(monkeypatch):
    prompts = [f"{i % 7} of {i}" for i in range(150)]
    answers, rearranged, rearrange = {}, [], Scheduler.rearrange

    def note(scheduler, plan):
        rearranged.append(len(scheduler.leaves_not_begun()))
        rearrange(scheduler, plan)

    monkeypatch.setattr(Scheduler, "rearrange", note)
    for policy in ("dfs", "auto"):
        assert not rearranged
        llm = LLM("fake", policy=policy, kv_memory=1 << 21, max_num_seqs=8)
        answers[policy] = llm.generate(prompts, SamplingParams(max_tokens=40))
    assert [o.text for o in answers["auto"]] == [o.text for o in answers["dfs"]]
    assert len(rearranged) == 1 and 10 < rearranged[0] < 86
    llm.generate(prompts, SamplingParams(max_tokens=40))  # now lengths are known from the first
    assert len(rearranged) == 1


def test_no_thread_can_be_started(monkeypatch):
    monkeypatch.setattr(choose, "_WORTH_THREADS", 1)
    usual = Window()
    expected = usual.run()

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", start)
    window = Window()
    assert window.run() == expected
    assert window.chosen == usual.chosen
