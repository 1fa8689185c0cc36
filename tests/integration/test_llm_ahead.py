"""The whole entry with a runner that is kept a step ahead: the same answers, whatever happens."""

import numpy as np
import pytest
from scheduling import LateRunner

from batchllm import LLM, SamplingParams
from batchllm.request import Request
from batchllm.watch import Watch

PROMPTS = [f"the same beginning, number {i % 7} {'x' * (i % 5)}" for i in range(30)]
PARAMS = [
    SamplingParams(max_tokens=1 + i % 12, temperature=i % 2, seed=i, ignore_eos=i % 3 == 0)
    for i in range(30)
]


@pytest.fixture(params=[("tiny", "auto"), ("tiny", "streaming"), ("fake", "auto")])
def llm(request, tiny_model):
    model, policy = request.param
    return LLM(
        {"tiny": tiny_model, "fake": "fake"}[model],
        kv_memory=16 << 20,
        policy=policy,
        max_num_batched_tokens=64,
    )


def answers(llm):
    outputs = llm.generate(PROMPTS, PARAMS)
    return [(o.row_index, o.output_token_ids.tolist(), o.finish_reason) for o in outputs]


def test_answers_are_those_of_one_step_at_a_time(llm):
    expected = answers(llm)
    assert llm.metrics.vain_tokens == 0
    late = llm.runner = LateRunner(llm.runner)
    assert answers(llm) == expected
    assert late.steps == []
    stopped = sum(reason == "stop" for _, _, reason in expected)
    assert min(stopped, 1) <= llm.metrics.vain_tokens <= stopped


@pytest.mark.parametrize("when", [{0}, {4}, {9, 12}])
def test_a_step_without_memory_halves_the_pool_and_the_rest_is_run_again(llm, monkeypatch, when):
    expected = answers(llm)
    execute, count = llm.runner.execute, iter(range(10_000))

    def perhaps(batch):
        if next(count) in when:
            raise MemoryError
        return execute(batch)

    monkeypatch.setattr(llm.runner, "execute", perhaps)
    llm.runner = LateRunner(llm.runner)  # which says if a step runs when the pool is taken away
    assert answers(llm) == expected
    assert llm.metrics.pool_shrinks == len(when)


@pytest.mark.parametrize("error", [None, RuntimeError("a disk is full")])
def test_when_it_is_stopped_the_step_that_runs_is_waited_for(llm, error):
    expected = answers(llm)
    late = llm.runner = LateRunner(llm.runner)
    asked = iter(range(10_000))

    def should_stop():
        step = next(asked)
        assert step != 4 or late.steps, "no step runs ahead"
        if step == 4 and error:
            raise error
        return step >= 4

    requests = [
        Request(i, np.array([40 + i], np.int32), SamplingParams(max_tokens=9, ignore_eos=True))
        for i in range(12)
    ]
    watch = Watch(should_stop=should_stop)
    if error:
        with pytest.raises(RuntimeError, match="disk"):
            llm.answer(requests, watch=watch)
    else:
        assert llm.answer(requests, watch=watch) == []
    assert late.steps == []
    assert answers(llm) == expected
