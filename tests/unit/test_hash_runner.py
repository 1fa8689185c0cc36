"""The model `fake`: its runner held against the definition, under memory that barely suffices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import MAX_MODEL_LEN, ROWS, CheckingEngine, requests

from batchllm.cache.block_pool import BlockPool
from batchllm.errors import ModelError
from batchllm.models.checkpoint import open_model
from batchllm.models.fake_checkpoint import FAKE_MODEL, FakeCheckpoint
from batchllm.prefix.plan import plan_requests
from batchllm.runner.hash_runner import HashRunner
from batchllm.scheduler.scheduler import Scheduler

ANSWERS = list(range(50, 81))
EOS = frozenset({50})


def next_token(context):
    state = sum((t + 1) * 0x9E3779B97F4A7C15 ** (i + 1) for i, t in enumerate(context)) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    return ANSWERS[(state ^ (state >> 27)) % len(ANSWERS)]


def expected(prompt, max_tokens):
    answer = []
    while len(answer) < min(max_tokens, MAX_MODEL_LEN - len(prompt)):
        answer.append(next_token([*prompt, *answer]))
        if answer[-1] in EOS:
            break
    return answer


@given(
    rows=ROWS,
    block_size=st.integers(1, 5),
    num_blocks=st.integers(40, 80),
    budget=st.integers(1, 40),
    share=st.booleans(),
)
@settings(max_examples=150)
def test_the_next_token_depends_on_the_whole_context(rows, block_size, num_blocks, budget, share):
    plan = plan_requests(requests(rows), policy="ratio", sharing=share)
    scheduler = Scheduler(
        BlockPool(num_blocks, block_size),
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=budget,
        max_num_seqs=64,
        eos_token_ids=EOS,
    )
    runner = HashRunner(num_blocks, block_size, MAX_MODEL_LEN, ANSWERS)
    tree = plan.tree
    for sequence in CheckingEngine(scheduler, runner).run(plan):
        row = rows[tree.rows[tree.row_offsets[sequence.leaf]]]
        assert sequence.output_token_ids.tolist() == expected(*row)


def test_a_block_that_was_overwritten_changes_the_answer():
    plan = plan_requests(requests([([0, 1, 0, 1, 1], 6)]), policy="dfs")
    scheduler = Scheduler(
        BlockPool(8, 2), max_model_len=64, max_num_batched_tokens=3, max_num_seqs=4
    )
    runner = HashRunner(8, 2, 64, ANSWERS)
    scheduler.add(plan)
    step = scheduler.schedule()
    scheduler.update(step, runner.execute(step))
    runner._states += np.uint64(1)
    answers = []
    while scheduler.has_unfinished:
        step = scheduler.schedule()
        answers += scheduler.update(step, runner.execute(step))
    assert answers[0].output_token_ids.tolist() != expected([0, 1, 0, 1, 1], 6)


def test_fake_is_a_model_by_name_with_text_to_and_from_bytes(tmp_path, monkeypatch):
    model = open_model(FAKE_MODEL)
    assert isinstance(model, FakeCheckpoint)
    tokenizer = model.tokenizer()
    tokens = tokenizer.encode_batch(["zwei Wörter"], add_special_tokens=True)
    assert len(tokens.values) == len("zwei Wörter".encode())
    assert tokenizer.decode_batch([tokens[0]]) == ["zwei Wörter"]
    assert set(tokenizer.decode_batch([np.array(model.answer_token_ids)])[0]) <= set(
        " abcdefghijklmnopqrstuvwxyz"
    )
    assert set(tokenizer.eos_token_ids) < set(model.answer_token_ids)
    monkeypatch.chdir(tmp_path)
    (tmp_path / FAKE_MODEL).mkdir()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        open_model(FAKE_MODEL)
