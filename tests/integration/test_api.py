"""The Python API on a tiny random model."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from batchllm import LLM, SamplingParams
from batchllm.cpus import available_cpus
from batchllm.errors import UsageError
from batchllm.models.safetensors_checkpoint import SafetensorsCheckpoint

PROMPTS = [f"the same beginning, number {i % 7} {'x' * (i % 5)}" for i in range(30)] + ["other"]
PARAMS = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def llm(tiny_model):
    return LLM(tiny_model, kv_memory=64 << 20)


@pytest.fixture(scope="module")
def alone(llm):
    """Each prompt answered with nothing else around."""
    return [llm.generate([p], PARAMS)[0].text for p in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sharing": False},
        {"policy": "table-order"},
        {"policy": "dfs", "max_num_batched_tokens": 7},
        {"policy": "dual-scan"},
        {"policy": "streaming"},
        {"policy": "streaming", "kv_memory": 60_000, "block_size": 4, "max_num_batched_tokens": 9},
        {"max_num_seqs": 3},
        {"kv_memory": 60_000, "block_size": 4},
        {"attention_backend": "reference"},
    ],
)
def test_answers_do_not_depend_on_how_they_are_computed(tiny_model, alone, options):
    llm = LLM(tiny_model, **({"kv_memory": 64 << 20} | options))
    outputs = llm.generate(PROMPTS, PARAMS)
    assert [o.text for o in outputs] == alone
    assert [o.row_index for o in outputs] == list(range(len(PROMPTS)))


def test_counts_add_up(tiny_model):
    llm = LLM(tiny_model, kv_memory=64 << 20)
    outputs = llm.generate(PROMPTS, PARAMS)
    m = llm.metrics
    assert m.rows == len(PROMPTS)
    assert m.duplicate_rows == len(PROMPTS) - len(set(PROMPTS))
    assert m.prompt_tokens == sum(o.prompt_tokens for o in outputs)
    assert m.prompt_tokens - m.computed_prompt_tokens == sum(o.cached_tokens for o in outputs)
    assert m.output_tokens == sum(o.output_tokens for o in outputs)


def test_computed_tokens_are_the_distinct_prefixes(tiny_model):
    """Brute force: every distinct prefix once, and last tokens again where others go on."""
    llm = LLM(tiny_model, kv_memory=64 << 20)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(20, 23, rng.integers(1, 40)).tolist() for _ in range(200)]
    llm.generate(prompts, SamplingParams(max_tokens=1))
    distinct = {tuple(p[:i]) for p in prompts for i in range(1, len(p) + 1)}
    unique = {tuple(p) for p in prompts}
    inner = sum(any(q[: len(p)] == p for q in unique - {p}) for p in unique)
    assert llm.metrics.repeated_last_tokens == inner > 0
    assert llm.metrics.computed_prompt_tokens == len(distinct) + inner


def test_table_gets_its_columns(llm, alone):
    table = pa.table({"id": range(len(PROMPTS)), "text": PROMPTS})
    done = llm.generate(table, PARAMS, prompt_column="text", output_column="out")
    assert done.column_names == [
        *("id", "text", "out", "finish_reason"),
        *("prompt_tokens", "cached_tokens", "output_tokens", "error"),
    ]
    assert done["out"].to_pylist() == alone
    assert done["error"].null_count == len(PROMPTS)
    again = llm.generate(done, PARAMS, prompt_column="text", output_column="second")
    assert again["second"].to_pylist() == alone
    assert "second_error" in again.column_names
    with pytest.raises(UsageError, match="choose another"):
        llm.generate(done, PARAMS, prompt_column="text", output_column="out")


def test_a_bad_row_costs_itself(llm, alone):
    table = pa.table({"text": [*PROMPTS[:3], None, "y" * 600, PROMPTS[4]]})
    done = llm.generate(table, PARAMS, prompt_column="text")
    answers = done["answer"].to_pylist()
    assert answers[:3] + answers[5:] == [*alone[:3], alone[4]]
    errors = done["error"].to_pylist()
    assert errors[3].startswith("null_prompt: ") and errors[4].startswith("prompt_too_long: ")
    assert done["finish_reason"].to_pylist()[3:5] == ["error", "error"]


def test_a_row_too_big_for_the_memory_is_an_error(tiny_model):
    llm = LLM(tiny_model, kv_memory=30_000, block_size=4)
    room = llm.num_kv_blocks * 4
    good, bad = llm.generate(
        [[30] * 5, list(range(30, 30 + room))],
        [SamplingParams(max_tokens=2), SamplingParams(max_tokens=20)],
    )
    assert good.error is None and good.output_tokens >= 1
    assert bad.error is not None and bad.error.code == "kv_memory"
    assert bad.text is None


def test_sampled_answers_go_by_seed_and_row(llm):
    params = SamplingParams(max_tokens=10, temperature=1.5, seed=3)
    first = [o.text for o in llm.generate(["same"] * 6, params)]
    assert len(set(first)) > 1
    assert [o.text for o in llm.generate(["same"] * 6, params)] == first
    other = SamplingParams(max_tokens=10, temperature=1.5, seed=4)
    assert [o.text for o in llm.generate(["same"] * 6, other)] != first
    mixed = llm.generate(["same", "different", *["same"] * 4], params)
    assert [mixed[i].text for i in (0, 2, 3, 4, 5)] == [first[i] for i in (0, 2, 3, 4, 5)]


def test_chat_equals_the_template_around_a_prompt(llm):
    one = llm.generate(["hello"], PARAMS)[0]
    two = llm.chat([[{"role": "user", "content": "hello"}]], PARAMS)[0]
    raw = llm.generate(["hello"], PARAMS, chat=False)[0]
    assert one.text == two.text
    assert raw.prompt_tokens < one.prompt_tokens


def test_token_limit_and_eos(llm):
    outputs = llm.generate(["a", "b"], [SamplingParams(max_tokens=n) for n in (1, 5)])
    assert [o.output_tokens for o in outputs] == [1, 5] or any(
        o.finish_reason == "stop" for o in outputs
    )
    long = llm.generate(["a"], SamplingParams(max_tokens=300, ignore_eos=True))[0]
    assert (long.output_tokens, long.finish_reason) == (300, "length")


def test_the_context_ends_an_answer(llm):
    prompt = [30] * (llm.max_model_len - 4)
    output = llm.generate([prompt], SamplingParams(max_tokens=50, ignore_eos=True))[0]
    assert (output.output_tokens, output.finish_reason) == (4, "length")


def test_an_interrupt_leaves_the_engine_usable(llm, alone, monkeypatch):
    runner, calls = llm.runner, []
    execute = runner.execute

    def interrupt(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return execute(batch)

    monkeypatch.setattr(runner, "execute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, PARAMS)
    monkeypatch.undo()
    assert [o.text for o in llm.generate(PROMPTS, PARAMS)] == alone


def test_threads_are_set_before_the_weights_are_loaded(tiny_model, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before, seen = torch.get_num_threads(), []
    weights = SafetensorsCheckpoint.weights

    def look(checkpoint, *arguments):
        seen.append(torch.get_num_threads())
        return weights(checkpoint, *arguments)

    monkeypatch.setattr(SafetensorsCheckpoint, "weights", look)
    try:
        for options, expected in (({"threads": 3}, 3), ({}, available_cpus().best)):
            llm = LLM(tiny_model, kv_memory=16 << 20, **options)
            assert (seen.pop(), llm.threads.count) == (expected, expected)
            assert f"{expected} thread" in llm.describe()
    finally:
        torch.set_num_threads(before)


def test_no_prompts(llm):
    assert llm.generate([], PARAMS) == []
    empty = pa.table({"text": pa.array([], pa.string())})
    assert llm.generate(empty, PARAMS, prompt_column="text").num_rows == 0


def test_wrong_arguments(llm, tiny_model):
    with pytest.raises(UsageError, match="2 prompts, but 1"):
        llm.generate(["a", "b"], [PARAMS])
    with pytest.raises(UsageError, match="only applies to a table"):
        llm.generate(["a"], PARAMS, prompt_column="x")
    with pytest.raises(UsageError, match="made for"):
        LLM(tiny_model, max_model_len=100_000)
    with pytest.raises(UsageError, match="no policy named"):
        LLM(tiny_model, policy="magic")
