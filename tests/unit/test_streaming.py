"""The streaming scheduler: right answers, honest books, hits where vLLM has them."""

from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import (
    EOS,
    MAX_MODEL_LEN,
    POISONED_ROWS,
    ROWS,
    CheckingEngine,
    driver,
    expected_answer,
    expected_ending,
    is_poisoned,
    requests,
)

from batchllm.cache.lru_cache import LRUBlockCache
from batchllm.prefix.plan import plan_requests
from batchllm.request import RaggedTokens
from batchllm.runner.fake_runner import FakeRunner
from batchllm.scheduler.streaming import StreamingScheduler, block_keys


def never(context):
    return False


def run(
    rows, *, num_blocks, block_size, budget=16, max_num_seqs=8, fails=never, ahead=False, **params
):
    plan = plan_requests(requests(rows, **params), policy="table-order", sharing=False)
    scheduler = StreamingScheduler(
        num_blocks,
        block_size,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        eos_token_ids=EOS,
    )
    runner = FakeRunner(num_blocks, block_size, fails=fails)
    done = {s.leaf: s for s in CheckingEngine(scheduler, driver(runner, ahead=ahead)).run(plan)}
    assert scheduler.cache.num_free == num_blocks
    return done, scheduler


@given(
    rows=ROWS,
    block_size=st.integers(1, 5),
    spare=st.integers(0, 30),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 20),
    ignore_eos=st.booleans(),
    ahead=st.booleans(),
)
@settings(max_examples=200)
def test_every_row_is_answered_right_whatever_the_memory(
    rows, block_size, spare, budget, max_num_seqs, ignore_eos, ahead
):
    longest = max(min(len(p) + m - 1, MAX_MODEL_LEN) for p, m in rows)
    done, scheduler = run(
        rows,
        num_blocks=-(-longest // block_size) + spare,
        block_size=block_size,
        budget=budget,
        max_num_seqs=max_num_seqs,
        ignore_eos=ignore_eos,
        ahead=ahead,
    )
    assert sorted(done) == list(range(len(rows)))
    for i, (prompt, max_tokens) in enumerate(rows):
        expected = expected_answer(prompt, max_tokens, ignore_eos=ignore_eos)
        assert done[i].output_token_ids.tolist() == expected
    fresh = sum(s.num_fresh_prompt_tokens for s in done.values())
    assert fresh <= sum(len(p) for p, _ in rows)
    assert scheduler.stats.computed_prompt_tokens >= fresh
    early = sum(s.finish_reason == "stop" for s in done.values())
    assert scheduler.stats.vain_tokens <= early * ahead


@given(
    rows=POISONED_ROWS,
    block_size=st.integers(1, 5),
    spare=st.integers(0, 30),
    ahead=st.booleans(),
)
@settings(max_examples=100)
def test_rows_without_usable_logits_fail_and_no_others(rows, block_size, spare, ahead):
    longest = max(min(len(p) + m - 1, MAX_MODEL_LEN) for p, m in rows)
    num_blocks = -(-longest // block_size) + spare
    done, _ = run(
        rows, num_blocks=num_blocks, block_size=block_size, fails=is_poisoned, ahead=ahead
    )
    for i, row in enumerate(rows):
        assert (done[i].ending, done[i].output_token_ids.tolist()) == expected_ending(*row)


def test_a_window_finds_nothing_of_the_one_before():
    scheduler = StreamingScheduler(
        40, 4, max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=16, max_num_seqs=8
    )
    runner = FakeRunner(40, 4)
    for first in (0, 1, 0):
        rows = [([first] * 9 + [i], 5) for i in range(6)]
        plan = plan_requests(requests(rows), policy="table-order", sharing=False)
        done = {s.leaf: s for s in CheckingEngine(scheduler, runner).run(plan)}
        for i, row in enumerate(rows):
            answer = done[i].output_token_ids.tolist()
            assert answer == expected_answer(*row, ignore_eos=True)


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=20),
    st.integers(1, 4),
)
def test_block_keys_are_equal_where_all_tokens_so_far_are(prompts, size):
    keys = block_keys(RaggedTokens.from_sequences(prompts), size)
    seen = {}
    for prompt, blocks in zip(prompts, keys, strict=True):
        assert len(blocks) == len(prompt) // size
        for block, key in enumerate(blocks):
            content = tuple(prompt[: (block + 1) * size])
            assert seen.setdefault(key, content) == content
    assert len(seen) == len(set(seen.values()))


def test_full_blocks_are_found_again_and_the_last_token_is_computed():
    prompt = list(range(10, 22))  # three blocks of four
    rows = [(prompt, 2), (prompt, 2), ([*prompt[:9], 5, 5], 2)]
    done, scheduler = run(rows, num_blocks=20, block_size=4, max_num_seqs=1)
    fresh = [done[i].num_fresh_prompt_tokens for i in range(3)]
    assert fresh == [12, 4, 3]  # the whole last block; what follows the two full ones
    assert scheduler.stats.computed_prompt_tokens == 19


def test_what_was_not_used_for_longest_is_forgotten_first():
    cache = LRUBlockCache(4)
    a, b, c, d = cache.allocate(4)
    for block, key in ((a, 1), (b, 2), (c, 3)):
        cache.remember([block], [key])
    cache.release([b], 1)
    cache.release([a, c, d], 2)  # c is nearer the end of its sequence and goes before a
    assert cache.find([2]) == [b] and cache.num_free == 4
    assert cache.allocate(1) == [d]  # it was not full, so it holds nothing to be found
    assert cache.allocate(1) == [b]
    assert cache.find([2]) == [] and cache.find([1, 3]) == [a, c]
    assert cache.allocate(1) == [c]
    cache.share([a])
    assert cache.num_free == 0
    cache.check([a, b, c, d])


def test_few_blocks_preempt_the_last_admitted():
    rows = [([i, i + 1, i + 2], 20) for i in range(6)]
    done, scheduler = run(rows, num_blocks=12, block_size=2, ignore_eos=True)
    assert scheduler.stats.preemptions > 0
    for i, (prompt, max_tokens) in enumerate(rows):
        assert done[i].output_token_ids.tolist() == expected_answer(
            prompt, max_tokens, ignore_eos=True
        )
