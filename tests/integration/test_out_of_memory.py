"""Memory runs out: for the KV pool, and in the middle of a run."""

import io
import json
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import tiny_config, write_safetensors_model

from batchllm import LLM, SamplingParams, api
from batchllm.errors import OutOfMemoryError, UsageError
from batchllm.progress import Progress
from batchllm.request import Request
from batchllm.runner.kv_cache import KVCache
from batchllm.watch import Watch

PROMPTS = [f"the same beginning, number {i % 7} {'x' * (i % 5)}" for i in range(30)]
PARAMS = SamplingParams(max_tokens=12)
TORCH_SAYS = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 1073741824 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture(params=["tiny", "fake"])
def llm(request, tiny_model):
    return LLM({"tiny": tiny_model, "fake": "fake"}[request.param], kv_memory=16 << 20)


def fail(monkeypatch, llm, error, steps):
    """Let the steps with these numbers fail."""
    execute, count = llm.runner.execute, iter(range(10_000))

    def perhaps(batch):
        if next(count) in steps:
            raise error
        return execute(batch)

    monkeypatch.setattr(llm.runner, "execute", perhaps)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError(TORCH_SAYS), OSError(12, "Cannot allocate memory")]
)
@pytest.mark.parametrize("steps", [{0}, {4}, {9, 12}])
def test_a_step_without_memory_halves_the_pool_and_the_rest_is_run_again(
    llm, monkeypatch, error, steps
):
    lengths = [SamplingParams(max_tokens=1 + i % 12) for i in range(len(PROMPTS))]
    expected = llm.generate(PROMPTS, lengths)
    blocks, counted = llm.num_kv_blocks, llm.metrics.rows
    fail(monkeypatch, llm, error, steps)
    outputs = llm.generate(PROMPTS, lengths)
    assert [o.text for o in outputs] == [o.text for o in expected]
    assert [o.row_index for o in outputs] == list(range(len(PROMPTS)))
    assert llm.num_kv_blocks == blocks >> len(steps)
    assert llm.limits.max_num_batched_tokens == 2048 >> len(steps)
    assert (llm.metrics.pool_shrinks, llm.metrics.rows) == (len(steps), 2 * counted)
    # The next window goes on with that.
    assert [o.text for o in llm.generate(PROMPTS, lengths)] == [o.text for o in expected]
    assert llm.num_kv_blocks == blocks >> len(steps)


def test_rows_that_had_finished_are_not_run_again(llm, monkeypatch):
    rows = [SamplingParams(max_tokens=1 + 11 * (i % 2), ignore_eos=True) for i in range(30)]
    fail(monkeypatch, llm, MemoryError(), {5})
    outputs = llm.generate([[40 + i] * 3 for i in range(30)], rows)
    assert [o.output_tokens for o in outputs] == [1, 12] * 15
    assert llm.metrics.computed_output_tokens == 15 * 13


def test_answers_are_handed_over_once_and_a_stop_is_no_lack_of_memory(llm, monkeypatch):
    monkeypatch.setattr(api, "_KEEP_SECONDS", 0)
    requests = [
        Request(i, np.array([40 + i], np.int32), SamplingParams(max_tokens=1 + i, ignore_eos=True))
        for i in range(12)
    ]
    kept = []

    def keep(outputs):
        kept.extend(output.row_index for output in outputs)

    fail(monkeypatch, llm, MemoryError(), {5, 9})
    assert len(llm.answer(requests, watch=Watch(keep=keep))) == 12
    assert len(kept) == len(set(kept)) > 6
    assert llm.answer(requests, watch=Watch(should_stop=lambda: True)) == []
    assert llm.metrics.pool_shrinks == 2


def test_it_is_said_and_given_up_at_last(llm, monkeypatch):
    shown = io.StringIO()
    progress = Progress(1, stream=shown)
    request = Request(0, np.array([40, 41], np.int32), PARAMS)
    fail(monkeypatch, llm, MemoryError(), range(5))
    with pytest.raises(OutOfMemoryError, match="ran out 5 times, the last with 1 MiB"):
        llm.answer([request], watch=Watch(progress=progress))
    lines = shown.getvalue().splitlines()
    assert len(lines) == 4 and "8 MiB of KV memory and at most 1,024 tokens" in lines[0]
    assert llm.answer([request])[0].error is None


def test_other_errors_are_not_taken_for_it(llm, monkeypatch):
    fail(monkeypatch, llm, RuntimeError("shapes do not match"), {3})
    with pytest.raises(RuntimeError, match="shapes"):
        llm.generate(PROMPTS, PARAMS)
    assert llm.metrics.pool_shrinks == 0


def small_cache(num_blocks):
    return KVCache(
        num_layers=2,
        num_blocks=num_blocks,
        block_size=4,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
    )


def test_a_pool_that_the_system_does_not_give_is_halved(monkeypatch, tiny_model):
    real = mmap.mmap

    def limited(fileno, length):
        if length > limit:
            raise OSError(12, "Cannot allocate memory")
        return real(fileno, length)

    monkeypatch.setattr(mmap, "mmap", limited)
    block = 2 * 2 * 4 * 2 * 8 * 4
    limit = 30 * block
    assert small_cache(100).num_blocks == 25
    limit = block - 1
    with pytest.raises(UsageError, match="one block of the KV cache"):
        small_cache(100)
    limit = 5 << 20
    llm = LLM(tiny_model, kv_memory=16 << 20)
    assert 3 << 20 < llm.kv_memory <= 4 << 20
    assert "warning: the system gave 25% of what" in llm.describe()
    assert llm.generate(["a"], PARAMS)[0].error is None


# Under a limit on its address space, first too low for the pool, then for a step's activations.
LIMITED = """
import json, resource, sys
from pathlib import Path
from batchllm import LLM, SamplingParams

def limit(more):
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, resource.RLIM_INFINITY))

prompts = [[20 + (i * 7 + j * j) % 200 for j in range(400)] for i in range(20)]
params = SamplingParams(max_tokens=3, ignore_eos=True)
options = {"kv_memory": 1 << 30, "threads": 2, "max_num_seqs": 500}
LLM(sys.argv[1], **options).generate(prompts, params)  # threads and what else comes with use
limit(300 << 20)
llm = LLM(sys.argv[1], **options)
loaded, described = llm.kv_memory, llm.describe()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
expected = [o.text for o in llm.generate(prompts, params)]
limit(40 << 20)
got = [o.text for o in llm.generate(prompts, params)]
facts = {"loaded": loaded, "described": described, "same": got == expected}
facts |= {"shrinks": llm.metrics.pool_shrinks, "kv_memory": llm.kv_memory}
print(json.dumps(facts))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_limited_address_space_is_lived_with(tmp_path):
    config = tiny_config(
        max_position_embeddings=512,
        intermediate_size=4096,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = write_safetensors_model(tmp_path / "model", config=config)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, model], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["loaded"] < 300 << 20 and "warning: the system gave" in facts["described"]
    assert facts["same"]
    assert 1 <= facts["shrinks"] <= 2
    # What was held is given back first, or there would not be room for half of it.
    assert facts["kv_memory"] == pytest.approx(facts["loaded"] >> facts["shrinks"], rel=0.01)
