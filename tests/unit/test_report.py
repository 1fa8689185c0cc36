"""Reports: counts that add up, and pages that can be read."""

import numpy as np
import pytest
from builders import tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from batchllm.errors import UsageError
from batchllm.prefix.policies.registry import policy_names
from batchllm.report.bars import bar, by_powers
from batchllm.report.lru import LRUReplay
from batchllm.report.plan import PlanReport, add_window
from batchllm.report.prompts import Prompts
from batchllm.report.simulation import TableSimulation
from batchllm.request import RaggedTokens
from batchllm.simulate.machine import get_machine
from batchllm.simulate.shape import get_shape

PROMPTS = st.lists(st.lists(st.integers(65, 67), min_size=1, max_size=16), min_size=1, max_size=25)


def window(prompts, output_tokens=3):
    tokens = RaggedTokens.from_sequences(prompts)
    return Prompts(tokens, np.full(len(prompts), output_tokens))


@given(PROMPTS)
def test_savings_by_size_and_depth_add_up(prompts):
    report = PlanReport()
    add_window(report, window(prompts), tiny_tokenizer())
    assert report.prompt_tokens == sum(map(len, prompts))
    assert report.duplicate_rows == len(prompts) - len({tuple(p) for p in prompts})
    shared = sum(report.saved_by_rows.values())
    assert shared == sum(report.saved_by_depth.values())
    # What duplicates save beyond their shared nodes is their leaves' own part.
    own = report.prompt_tokens - report.computed_tokens - shared
    assert 0 <= own <= report.duplicate_rows * 16


@given(PROMPTS, st.integers(1, 4))
def test_a_large_cache_finds_every_full_block_seen_before(prompts, size):
    seen, found = set(), 0
    for prompt in prompts:
        full = [tuple(prompt[: end * size]) for end in range(1, len(prompt) // size + 1)]
        usable = full[: (len(prompt) - 1) // size]  # the last token is computed in any case
        found += size * sum(block in seen for block in usable)
        seen |= set(full)
    replay = LRUReplay(10_000, size)
    replay.add(RaggedTokens.from_sequences(prompts))
    assert replay.saved_share == found / sum(map(len, prompts))


def test_replay_finds_what_is_still_there():
    a, b = list(range(100, 132)), list(range(200, 232))
    replay = LRUReplay(4 * 16, 16)
    replay.add(RaggedTokens.from_sequences([[*a, 1], [*a, 2], [*b, 1], [*a, 3]]))
    # The second finds both blocks of the first; the third drives the later of them out.
    assert replay.saved_share == (32 + 16) / 132


def test_charts_have_a_line_a_power_of_two():
    lines = by_powers("title", "rows", {1: 30, 3: 10})
    assert len(lines) == 4
    assert "2 to 3" in lines[1] and "75.0%" in lines[1]
    assert "4 to 7" in lines[2] and "0.0%" in lines[2]
    assert bar(1.0, 4) == "████" and bar(0.5, 4) == "██  " and bar(0.125, 1) == "▏"
    assert by_powers("title", "rows", {}) == []


def test_memory_for_less_than_a_block_is_refused():
    with pytest.raises(UsageError, match="does not hold one block"):
        TableSimulation(get_machine("h100"), get_shape("llama-3.1-8b"), kv_tokens=15)


def test_simulation_has_every_policy_and_its_share_of_the_bound():
    prompts = [[g] * 40 + [i] for g in range(70, 74) for i in range(8)]
    simulation = TableSimulation(get_machine("h100"), get_shape("llama-3.1-8b"))
    for _ in range(2):
        simulation.add(window(prompts))
    report = simulation.report
    assert [o.policy for o in report.outcomes] == policy_names()
    by_name = {o.policy: o for o in report.outcomes}
    assert len(report.chosen) == 2
    assert by_name["auto"].seconds == min(by_name[n].seconds for n in ("dfs", "ratio", "dual-scan"))
    for outcome in report.outcomes:
        assert outcome.output_tokens == 2 * 32 * 3
        assert outcome.prompt_tokens == 2 * 32 * 41
        assert 0 < outcome.bound_share < outcome.total_share <= 1
    assert by_name["dfs"].computed_prompt_tokens == 2 * (4 * 40 + 32)
    text = report.as_text()
    assert all(name in text for name in policy_names()) and "auto takes" in text
