"""Greedy answers and logits against Hugging Face's implementation, on the default model's weights.

An answer is greedy if each of its tokens is Hugging Face's likeliest after the prompt and the
tokens before it, which one pass over both tells.

Text is this repository's own documentation and licence plus the example table's, cut into prompts
of 5 to 1,500 tokens, many of them sharing beginnings.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from oracle import check_greedy, load_gguf_model, logits_along

from batchllm import LLM, SamplingParams
from batchllm.models.locate import resolve
from batchllm.prefix.plan import plan_requests
from batchllm.request import Request
from batchllm.runner.model_input import build_model_input
from batchllm.scheduler.batch import StepOutput

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[2]
NUM_NEW_TOKENS = 12


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def oracle(dtype):
    """Hugging Face's model out of the same GGUF file."""
    return load_gguf_model(resolve(None), getattr(torch, dtype))


@pytest.fixture(scope="module")
def truth(dtype, oracle):
    """The same model in float32: how far bfloat16 is from it is what rounding does."""
    return oracle if dtype == "float32" else load_gguf_model(resolve(None), torch.float32)


@pytest.fixture(scope="module")
def llm(dtype):
    return LLM(dtype=dtype, kv_memory=1 << 30)


@pytest.fixture(scope="module")
def prompts(llm):
    """66 prompts: chats and plain text, alone and below shared beginnings, 5 to 1,500 tokens."""
    table = pq.read_table(ROOT / "datasets" / "example.parquet")
    texts = list(dict.fromkeys(table["text"].to_pylist()))
    licence = (ROOT / "LICENSE").read_text()
    encode = llm.tokenizer.encode_batch
    long = encode([licence, "\n".join(texts)], add_special_tokens=False)
    rng = np.random.default_rng(0)
    chosen = [long[i % 2][100:][:n] for i, n in enumerate([5, 6, 7, 17, 64, 255, 700, 1500])]
    for start in (0, 400):  # two documents, each asked several things: a tree of three levels
        head = long[0][start : start + 64]
        for part in range(2):
            section = np.concatenate([head, long[1][part * 300 :][: 24 + 12 * part]])
            for _ in range(6):
                at, size = rng.integers(1000), rng.integers(5, 24)
                chosen.append(np.concatenate([section, long[0][at : at + size]]))
    for _ in range(20):  # nothing in common
        at, size = rng.integers(900), int(rng.integers(5, 48))
        chosen.append(long[int(rng.integers(2))][at : at + size])
    chats = [f"{text[:120]}\n\nWhat is this about?" for text in texts[:14]]
    spec = [{"role": "user", "content": c} for c in chats]
    from batchllm.text.chat import ChatTemplate

    template = ChatTemplate(
        llm.tokenizer.chat_template, llm.tokenizer.bos_token, llm.tokenizer.eos_token
    )
    chosen += list(encode([template.render([m]) for m in spec], add_special_tokens=False))
    prompts = [c.tolist() for c in chosen]
    assert len(prompts) >= 64
    assert min(map(len, prompts)) == 5 and max(map(len, prompts)) == 1500
    return prompts


@pytest.fixture(scope="module")
def answers(llm, prompts):
    """Greedy, all prompts at once."""
    return answer(llm, prompts)


def answer(llm, prompts):
    outputs = llm.generate(prompts, SamplingParams(max_tokens=NUM_NEW_TOKENS))
    return [output.output_token_ids.tolist() for output in outputs]


@pytest.mark.parametrize(
    ("options", "expects"),
    [
        (None, "batched and shared"),
        ({"kv_memory": 1 << 30, "sharing": False}, "unshared"),
        ({"kv_memory": 1 << 30, "max_num_batched_tokens": 96}, "chunked"),
        ({"policy": "dfs"}, "preempted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_greedy_answers_equal(llm, oracle, truth, prompts, answers, dtype, options, expects):
    if dtype == "bfloat16" and expects in ("unshared", "chunked"):
        pytest.skip("float32 shows these exactly; in bfloat16 they add minutes and rounding")
    if expects == "preempted":  # room for the longest prompt, hardly more
        per_token = 2 * 30 * 3 * 64 * (2 if dtype == "bfloat16" else 4)
        options = options | {"kv_memory": 1540 * per_token}
    engine = llm if options is None else LLM(llm.checkpoint, dtype=dtype, **options)
    if expects == "preempted":  # teach it that answers are short, so that it admits too much
        for _ in range(100):
            engine._scheduler.lengths.observe(np.array([1]), np.array([NUM_NEW_TOKENS]))
    if expects in ("unshared", "chunked"):
        prompts = prompts[::2]
    got = answers if options is None else answer(engine, prompts)
    assert (engine.metrics.preemptions > 0) == (expects == "preempted")
    assert (engine.metrics.saved_share > 0.2) == (expects != "unshared")
    eos = set(llm.tokenizer.eos_token_ids)
    different = 0
    for prompt, ours in zip(prompts, got, strict=True):
        different += check_greedy(oracle, truth, eos, prompt, ours, NUM_NEW_TOKENS)
    print(f"{dtype}, {expects}: {different} tokens differ, all within rounding")
    assert different == 0 or dtype == "bfloat16"


def test_logits_agree(llm, oracle, truth, prompts, answers, dtype):
    """Next-token logits of every prompt, computed as one shared batch, against one at a time.

    In float32 they agree. In bfloat16 both sides round; ours may lie no further from the float32
    truth than Hugging Face's do.
    """
    requests = [
        Request(i, np.array(p, np.int32), SamplingParams(max_tokens=1))
        for i, p in enumerate(prompts)
    ]
    plan = plan_requests(requests)
    got = {}
    scheduler = llm.new_scheduler()
    scheduler.add(plan)
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        step = build_model_input(batch, llm.config.block_size)
        logits = llm.runner.logits(step)
        rows = step.samples.row_index.tolist()
        got |= {i: row.float() for i, row in zip(rows, logits, strict=True)}
        scheduler.update(batch, StepOutput(logits.argmax(-1).numpy().astype(np.int32)))
    assert set(got) == set(range(len(prompts)))
    theirs = first_logits(oracle, prompts, answers)
    if dtype == "float32":
        error = relative_errors([got[i] for i in range(len(prompts))], theirs).max()
        print(f"float32: logits differ by at most {error:.2e} of the largest")
        assert error < 1e-3
        return
    some = range(0, len(prompts), 2)  # their errors are an average's worth
    exact = first_logits(truth, [prompts[i] for i in some], [answers[i] for i in some])
    ours = relative_errors([got[i] for i in some], exact)
    their_errors = relative_errors([theirs[i] for i in some], exact)
    print(
        f"bfloat16: off by {ours.mean():.2e} on average, Hugging Face by {their_errors.mean():.2e}"
    )
    assert ours.mean() < 1.25 * their_errors.mean()


def first_logits(model, prompts, answers):
    """Those that each answer's first token is chosen by, float32 [num_vocab] each."""
    pairs = zip(prompts, answers, strict=True)
    return [logits_along(model, tuple(prompt), tuple(answer))[0] for prompt, answer in pairs]


def relative_errors(got, want):
    """Largest difference of each prompt's logits, relative to the largest logit."""
    return np.array(
        [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True)]
    )
