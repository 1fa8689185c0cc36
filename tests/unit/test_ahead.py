"""A step is planned while the one before it runs: what was sampled there is known one step late."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import (
    EOS,
    MAX_MODEL_LEN,
    ROWS,
    CheckingEngine,
    LateRunner,
    driver,
    expected_answer,
    fill_carried,
    requests,
)

from batchllm.engine import Engine
from batchllm.errors import OutOfMemoryError
from batchllm.prefix.plan import plan_requests
from batchllm.runner.fake_runner import FakeRunner
from batchllm.runner.model_input import build_model_input
from batchllm.scheduler.batch import NO_TOKEN, StepOutput
from batchllm.scheduler.expected import Expected
from batchllm.scheduler.factory import SchedulerLimits, make_scheduler
from batchllm.scheduler.lengths import LengthEstimator

END, OTHER = 7, 5  # a token that ends an answer, and one that does not
POLICIES = ["table-order", "streaming"]


def begin(rows, policy, *, num_blocks=11, block_size=1, budget=64, max_num_seqs=64, **params):
    """A scheduler that has the rows' plan, and expects answers of one token."""
    lengths = LengthEstimator()
    lengths.observe(np.full(30, 1), np.full(30, 16))
    limits = SchedulerLimits(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
    )
    scheduler = make_scheduler(policy, limits, EOS, lengths)
    sharing = policy != "streaming"
    return scheduler, plan_requests(requests(rows, **params), policy=policy, sharing=sharing)


def output(*tokens):
    return StepOutput(np.array(tokens, dtype=np.int32))


@given(
    rows=ROWS,
    block_size=st.integers(1, 4),
    spare=st.integers(0, 20),
    budget=st.integers(1, 30),
    policy=st.sampled_from(["dfs", "table-order", "streaming"]),
)
@settings(max_examples=40)
def test_known_lengths_make_the_same_steps(rows, block_size, spare, budget, policy):
    """To the block: an end that is known beforehand costs nothing to notice late."""
    longest = max(min(len(p) + m - 1, MAX_MODEL_LEN) for p, m in rows)
    num_blocks = 8 + -(-longest // block_size) + spare

    def steps(ahead):
        scheduler, plan = begin(
            rows,
            policy,
            num_blocks=num_blocks,
            block_size=block_size,
            budget=budget,
            ignore_eos=True,
        )
        engine = CheckingEngine(scheduler, driver(FakeRunner(num_blocks, block_size), ahead=ahead))
        seen = []
        engine.on_step = seen.append
        done = [(s.leaf, s.output_token_ids.tolist(), s.ending) for s in engine.run(plan)]
        assert scheduler.stats.vain_tokens == 0
        return done, seen, scheduler.stats

    at_once, ahead = steps(False), steps(True)
    assert (at_once[0], at_once[2]) == (ahead[0], ahead[2])
    for one, other in zip(at_once[1], ahead[1], strict=True):
        assert len(one.carried) == 0
        if policy != "streaming":  # it passes decodes over where the budget is short
            assert len(other.carried) == other.num_decodes
        want, got = (build_model_input(batch, block_size) for batch in (one, other))
        known = np.delete(np.arange(one.num_tokens), other.carried.token)
        assert np.array_equal(want.token_ids[known], got.token_ids[known])
        assert np.array_equal(want.slots, got.slots)
        assert np.array_equal(want.positions, got.positions)
        assert np.array_equal(want.items.block_ids, got.items.block_ids)
        assert np.array_equal(want.sample_rows, got.sample_rows)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("late", [END, OTHER, NO_TOKEN])
def test_what_a_step_samples_behind_an_end_is_discarded(policy, late):
    scheduler, plan = begin([([1, 2], 6), ([3, 4], 6)], policy, num_blocks=20)
    scheduler.add(plan)
    first = scheduler.schedule()
    scheduler.expect(first)
    second = scheduler.schedule()
    assert (second.carried.token.tolist(), second.carried.sample.tolist()) == ([0, 1], [0, 1])
    assert second.token_ids.tolist() == [0, 0]
    (ended,) = scheduler.update(first, output(OTHER, END))
    assert (ended.leaf, ended.output_token_ids.tolist(), ended.ending) == (1, [END], "stop")
    scheduler.expect(second)
    assert scheduler.stats.vain_tokens == 1
    scheduler.check()
    third = scheduler.schedule()
    assert third.samples.leaf.tolist() == [0] and third.carried.sample.tolist() == [0]
    assert scheduler.update(second, output(OTHER, late)) == []
    scheduler.expect(third)
    (ended,) = scheduler.update(third, output(END))
    assert ended.output_token_ids.tolist() == [OTHER, OTHER, END]
    assert not scheduler.has_unfinished and scheduler.stats.vain_tokens == 1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("token", "ending"), [(END, "stop"), (NO_TOKEN, "nan_logits")])
def test_a_sequence_may_be_preempted_before_it_is_known_to_have_ended(policy, token, ending):
    """It gives its blocks back, and then does not wait for others, but lets them in."""
    rows = [([1, 2], 10), ([1, 3], 10), ([9], 1)]
    scheduler, plan = begin(rows, policy, max_num_seqs=2)
    scheduler.add(plan)
    before = scheduler.schedule()
    for _ in range(4):  # one token is shared, and there are blocks for five more of each
        scheduler.expect(before)
        batch = scheduler.schedule()
        assert scheduler.update(before, output(OTHER, OTHER)) == []
        before = batch
    scheduler.expect(before)
    assert scheduler.stats.preemptions == 0
    batch = scheduler.schedule()
    assert scheduler.stats.preemptions == 1 and batch.samples.leaf.tolist() == [0]
    assert {0, 1} <= set(scheduler.running_leaves().tolist()), "its last step may still run"
    (ended,) = scheduler.update(before, output(OTHER, token))
    assert (ended.leaf, ended.ending) == (1, ending)
    assert ended.output_token_ids.tolist() == [OTHER] * 4 + [END] * (token == END)
    scheduler.expect(batch)
    scheduler.check()
    last = scheduler.schedule()
    assert last.samples.leaf.tolist() == [0, 2] and last.carried.token.tolist() == [0]
    assert [s.leaf for s in scheduler.update(batch, output(END))] == [0]
    scheduler.expect(last)
    scheduler.check()
    assert not scheduler.has_work
    assert [s.leaf for s in scheduler.update(last, output(OTHER, OTHER))] == [2]
    assert not scheduler.has_unfinished and scheduler.stats.vain_tokens == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_a_preempted_sequence_goes_on_with_the_token_it_got_late(policy):
    rows = [([i, i + 1, i + 2], 20) for i in range(6)]
    scheduler, plan = begin(rows, policy, num_blocks=24)
    done = {s.leaf: s for s in CheckingEngine(scheduler, LateRunner(FakeRunner(24, 1))).run(plan)}
    assert scheduler.stats.preemptions > 0
    for i, row in enumerate(rows):
        assert done[i].output_token_ids.tolist() == expected_answer(*row)


@pytest.mark.parametrize("policy", POLICIES)
def test_answers_as_long_as_they_may_be_are_not_scheduled_again(policy):
    scheduler, plan = begin([([i], 2) for i in range(9)], policy, num_blocks=20)
    scheduler.add(plan)
    first = scheduler.schedule()
    scheduler.expect(first)
    second = scheduler.schedule()
    scheduler.update(first, output(*[OTHER] * 9))
    scheduler.expect(second)
    assert scheduler.has_unfinished and not scheduler.has_work
    ways = [s.ending for s in scheduler.update(second, output(*[OTHER] * 7, END, NO_TOKEN))]
    assert ways == ["length"] * 7 + ["stop", "nan_logits"]
    assert not scheduler.has_unfinished


def test_lengths_are_learned_from_what_answers_became():
    scheduler, plan = begin([([i], 8) for i in range(4)], "table-order")
    seen = []
    scheduler.lengths.observe = lambda *columns: seen.append([c.tolist() for c in columns])
    scheduler.add(plan)
    first = scheduler.schedule()
    scheduler.expect(first)
    second = scheduler.schedule()
    assert seen == []
    scheduler.update(first, output(OTHER, END, NO_TOKEN, OTHER))
    assert seen == [[[1], [8]]]
    scheduler.expect(second)
    scheduler.update(second, output(END, END, END, END))
    assert seen[1:] == [[[2, 2], [8, 8]]]


def test_one_step_is_ahead_and_no_more():
    scheduler, plan = begin([([1], 5)], "table-order")
    scheduler.add(plan)
    batch = scheduler.schedule()
    scheduler.expect(batch)
    following = scheduler.schedule()
    with pytest.raises(AssertionError, match="one batch at a time"):
        scheduler.expect(following)
    with pytest.raises(AssertionError, match="another batch"):
        scheduler.update(following, output(OTHER))


ROWS_OF_ALL_LENGTHS = [([i % 2, i // 2 % 2, i], 3 + i % 7) for i in range(12)]


def engine_of(runner):
    scheduler, plan = begin(ROWS_OF_ALL_LENGTHS, "dfs", num_blocks=40, block_size=2, budget=12)
    return Engine(scheduler, runner), plan


def assert_answers_everything(runner):
    engine, plan = engine_of(runner)
    done = {int(plan.tree.leaf_row[s.leaf]): s.output_token_ids.tolist() for s in engine.run(plan)}
    assert done == {i: expected_answer(*row) for i, row in enumerate(ROWS_OF_ALL_LENGTHS)}


@pytest.mark.parametrize("taken", [0, 1, 2, 5, 9])
def test_nothing_runs_any_more_when_the_caller_has_stopped(taken):
    fake = FakeRunner(40, 2)
    runner = LateRunner(fake)
    engine, plan = engine_of(runner)
    steps = engine.steps(plan)
    for _ in range(taken):
        next(steps)
    assert len(runner.steps) == (taken > 1)
    steps.close()
    assert runner.steps == []
    assert_answers_everything(runner)


class Fails:
    """A runner that fails in one of its calls to a method."""

    def __init__(self, runner, method, error, when):
        self._runner, self._calls = runner, 0
        call = getattr(runner, method)

        def perhaps(batch):
            self._calls += 1
            if self._calls == when:
                raise error
            return call(batch)

        setattr(runner, method, perhaps)


@pytest.mark.parametrize("when", [1, 2, 6])
@pytest.mark.parametrize("method", ["submit", "execute"])
@pytest.mark.parametrize(
    ("error", "raised"), [(MemoryError(), OutOfMemoryError), (ValueError(), ValueError)]
)
def test_an_error_of_a_step_is_raised_and_nothing_runs_behind_it(when, method, error, raised):
    """Whether it comes when the step is submitted or when its result is asked."""
    fake = FakeRunner(40, 2)
    runner = LateRunner(fake)
    Fails({"submit": runner, "execute": fake}[method], method, error, when)
    engine, plan = engine_of(runner)
    with pytest.raises(raised):
        list(engine.run(plan))
    assert runner.steps == []
    assert_answers_everything(runner)


@given(st.data())
@settings(max_examples=50)
def test_a_batch_carries_what_its_sequences_sampled_in_whatever_order(data):
    scheduler, plan = begin([([i, i], 6) for i in range(12)], "table-order", num_blocks=90)
    scheduler.add(plan)
    orders = st.lists(st.integers(0, 11), unique=True)

    def batch(sequences):
        """Chunks of 1, 2, … tokens, of which every one samples."""
        some = np.array(sequences, dtype=np.int64)
        samples = replace(whole.samples, chunk=np.arange(len(some)), sequence=some)
        counts = 1 + np.arange(len(some))
        chunks = replace(whole.chunks, count=counts)
        position = np.zeros_like(some)
        return replace(whole, chunks=chunks, samples=replace(samples, output_position=position))

    whole = scheduler.schedule()
    before, after = data.draw(orders), data.draw(orders)
    expected = Expected.of(batch(before), np.zeros(12, dtype=np.bool_), np.full(12, 6))
    carried = expected.carry(batch(after)).carried
    got = dict(zip(carried.token.tolist(), carried.sample.tolist(), strict=True))
    ends = np.cumsum(1 + np.arange(len(after))) - 1
    places = {s: int(end) for s, end in zip(after, ends, strict=True)}
    assert got == {places[s]: i for i, s in enumerate(before) if s in places}


def test_carried_tokens_are_filled_in_and_a_missing_one_is_no_token():
    scheduler, plan = begin([([1, 2], 6), ([3], 6), ([4], 6)], "table-order")
    scheduler.add(plan)
    scheduler.expect(scheduler.schedule())
    batch = scheduler.schedule()
    assert batch.carried.sample.tolist() == [0, 1, 2]
    filled = fill_carried(batch, np.array([9, NO_TOKEN, 8], dtype=np.int32))
    assert filled.token_ids.tolist() == [9, 0, 8]
    assert batch.token_ids.tolist() == [0, 0, 0]
