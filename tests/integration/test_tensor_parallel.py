"""A model cut into shards: the same logits, in threads that meet at a barrier and in processes."""

import pickle
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import random_weights, tiny_config, write_gguf_model, write_safetensors_model
from process_checks import gone, hard_limit
from thread_group import in_shards

from batchllm import LLM, SamplingParams
from batchllm.attention.backend import make_backend
from batchllm.config import EngineConfig
from batchllm.engine import Engine
from batchllm.errors import ModelError, PeerLostError, UsageError, WorkerError, WorkerKilledError
from batchllm.models.checkpoint import ModelSource, open_checkpoint
from batchllm.models.operations import TorchOperations
from batchllm.models.parallel import WHOLE
from batchllm.models.registry import make_model
from batchllm.prefix.plan import plan_requests
from batchllm.request import Request
from batchllm.runner.device import CpuDevice
from batchllm.runner.kv_cache import KVCache
from batchllm.runner.load_device import load_on_device
from batchllm.runner.model_input import build_model_input
from batchllm.runner.smooth import _one_prompt, smooth
from batchllm.runner.tensor_parallel import TensorParallelAheadRunner, TensorParallelRunner
from batchllm.runner.threads import Threads
from batchllm.runner.workers import Shrink, Workers
from batchllm.scheduler.batch import Batch, Samples
from batchllm.scheduler.factory import SchedulerLimits, make_scheduler
from batchllm.text.prompts import PromptSpec

pytestmark = pytest.mark.usefixtures(hard_limit.__name__)

# Heads, channels and words that are all different, and words that no size divides.
CONFIG = tiny_config(
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    hidden_size=48,
    intermediate_size=94,
    vocab_size=271,
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=False,
)
TOKENS = np.random.default_rng(0).integers(0, 271, 40).astype(np.int32)
PROMPTS = [f"the same beginning, number {i % 7} {'x' * (i % 5)}" for i in range(30)]
PARAMS = [SamplingParams(max_tokens=1 + i % 9, temperature=i % 3) for i in range(30)]


def logits(checkpoint, shard, quantization=None):
    """Of every token of a prompt, [num_tokens, vocab_size]."""
    model = make_model(checkpoint.config, torch.float32, TorchOperations(), shard)
    model.load(checkpoint.weights(torch.float32, shard.part))
    backend = make_backend("reference", 16, model.config.head_dim)
    with torch.inference_mode():
        if quantization:
            smooth(model, backend, TOKENS[::-1].copy(), 16, torch.float32)
        model.pack(quantization)
        cache = KVCache(
            num_layers=model.config.num_layers,
            num_blocks=3,
            block_size=16,
            num_kv_heads=model.config.num_kv_heads,
            head_dim=model.config.head_dim,
            dtype=torch.float32,
        )
        step = _one_prompt(TOKENS, 3)
        plan = backend.plan(step, model.rotary(torch.from_numpy(step.positions)))
        hidden = model.forward(
            torch.from_numpy(TOKENS),
            lambda layer, qkv: plan.run(qkv, cache.keys[layer], cache.values[layer]),
            torch.arange(len(TOKENS)),
        )
        return model.logits(hidden)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("is_gguf", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_shards_compute_what_the_whole_does(tmp_path, size, is_gguf, tied):
    config = CONFIG | {"tie_word_embeddings": tied}
    if is_gguf:  # a format without biases, with blocks of 32 in the rows that are cut
        config |= {"attention_bias": False, "mlp_bias": False, "intermediate_size": 96}
        config |= {"vocab_size": 271, "hidden_size": 64}
        path = write_gguf_model(tmp_path / "m.gguf", config=config, qtype="Q8_0")
    else:
        path = write_safetensors_model(tmp_path / "m", config=config)
    checkpoint = open_checkpoint(path)
    expected = logits(checkpoint, WHOLE)
    each = in_shards(size, lambda shard: logits(checkpoint, shard))
    for found in each:
        assert torch.equal(found, each[0])  # to the last bit, or ranks would sample differently
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_each_has_its_heads_only_and_calls_the_others_twice_a_layer(tmp_path):
    checkpoint = open_checkpoint(write_safetensors_model(tmp_path / "m", config=CONFIG))

    def count(shard):
        model = make_model(checkpoint.config, torch.float32, TorchOperations(), shard)
        model.load(checkpoint.weights(torch.float32, shard.part))
        sizes = {n: t.numel() for n, t in model._places() if "layers.0" in n and "norm" not in n}
        return sum(sizes.values()), logits(checkpoint, shard) is not None, shard.group.calls

    whole = sum(
        tensor.size
        for name, tensor in random_weights(CONFIG).items()
        if "layers.0" in name and "norm" not in name
    )
    parts = in_shards(4, count)
    assert sum(part for part, _, _ in parts) == whole
    assert {calls for _, _, calls in parts} == {2 * 2 + 1}


@pytest.mark.parametrize("tied", [False, True])
def test_int8_rounds_no_worse_in_shards(tmp_path, tied):
    config = CONFIG | {"tie_word_embeddings": tied}
    checkpoint = open_checkpoint(write_safetensors_model(tmp_path / "m", config=config))
    exact = logits(checkpoint, WHOLE)
    error = (logits(checkpoint, WHOLE, "int8") - exact).square().mean()
    for found in in_shards(2, lambda shard: logits(checkpoint, shard, "int8")):
        assert 0 < (found - exact).square().mean() < 1.2 * error


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config(max_position_embeddings=512)
    return write_safetensors_model(tmp_path_factory.mktemp("models") / "tiny", config=config)


def test_shards_of_a_device_run_ahead_alike(model):
    checkpoint = open_checkpoint(model)
    requests = [
        Request(i, np.array([7] * 30 + [9 + i] * (1 + i % 5), np.int32), params)
        for i, params in enumerate(PARAMS)
    ]

    def answers(shard):
        config = EngineConfig(
            **{"attention_backend": "reference", "dtype": "float32", "kv_memory": 1 << 20},
            **{"block_size": 4, "max_num_batched_tokens": 40, "max_num_seqs": 12},
            tensor_parallel_size=shard.size,
        )
        threads, device = Threads(1, "for a test"), CpuDevice()
        loaded = load_on_device(checkpoint, config, 512, threads, None, device, None, shard)
        limits = SchedulerLimits(
            **{"num_blocks": loaded.num_blocks, "block_size": 4, "max_model_len": 512},
            **{"max_num_batched_tokens": 40, "max_num_seqs": 12},
        )
        engine = Engine(make_scheduler("dfs", limits, frozenset({2})), loaded.runner)
        finished = engine.run(plan_requests(requests, policy="dfs"))
        return loaded.num_blocks, {s.leaf: s.output_token_ids.tolist() for s in finished}

    expected = answers(WHOLE)
    assert len(expected[1]) > 20
    assert in_shards(2, answers) == [expected, expected]


def shared(model, **options):
    return LLM(model, kv_memory=16 << 20, tensor_parallel_size=2, **options)


def test_processes_answer_as_one_does_until_one_is_killed(model, monkeypatch):
    llm = shared(model)
    workers = psutil.Process().children()
    assert len(workers) == 1
    assert "2 processes" in llm.describe()
    meeting = llm.runner._workers._meeting  # a process that comes late waits for ever without
    assert meeting.exists()
    one = LLM(model, kv_memory=16 << 20)
    assert llm.num_kv_blocks == one.num_kv_blocks  # half as many bytes for a token in each
    for prompts, params in ((PROMPTS, PARAMS), (PROMPTS[:9], SamplingParams(max_tokens=5))):
        found, expected = llm.generate(prompts, params), one.generate(prompts, params)
        assert [o.text for o in found] == [o.text for o in expected]
    inner, steps = llm.runner._runner, iter(range(1000))
    execute = inner.execute

    def kill_at_the_third(batch):
        if next(steps) == 2:
            workers[0].kill()
        return execute(batch)

    monkeypatch.setattr(inner, "execute", kill_at_the_third)
    with pytest.raises(WorkerKilledError, match="tensor-parallel rank 1 was ended from outside"):
        llm.generate(PROMPTS, PARAMS)
    assert gone(workers) and not meeting.parent.exists()
    with pytest.raises(WorkerError, match="have been ended"):
        llm.generate(PROMPTS, PARAMS)


def test_a_worker_says_why_it_cannot_start(tmp_path):
    nowhere = ModelSource(str(tmp_path / "nowhere"))
    with closing(Workers(nowhere, EngineConfig(tensor_parallel_size=2), 99)) as workers:
        with pytest.raises(ModelError, match="nowhere"):
            workers.join()
        processes = psutil.Process().children()
    assert gone(processes)


class NoMemory:
    def execute(self, batch):
        raise MemoryError


def test_a_step_without_memory_is_the_last(model):
    one = LLM(model, kv_memory=16 << 20)
    nobody = Workers(ModelSource(str(model)), one.config, 99)  # of one process, that is all
    one.runner = TensorParallelRunner(NoMemory(), nobody)
    for reason in ("memory ran out in a step", "have been ended"):
        with pytest.raises(WorkerError, match=reason):
            one.generate(PROMPTS, PARAMS)
    assert not nobody._meeting.parent.exists()


class Told:
    """A worker, and what it is told; and a device, and what is asked of it."""

    def __init__(self):
        self.events = []

    def send_pickled(self, message):
        self.events.append(pickle.loads(message).params)

    def submit(self, batch):
        self.events.append("submit")
        return self

    def result(self):
        self.events.append("result")
        if self.events.count("result") == 2:
            raise MemoryError
        return "tokens"

    def failure(self):
        return None

    def close(self):
        self.events.append("end")


def test_where_steps_are_submitted_workers_are_told_first(model):
    told = Told()
    with closing(Workers(ModelSource(str(model)), EngineConfig(), 99)) as workers:
        workers._children.append(told)
        runner = TensorParallelAheadRunner(None, told.submit, workers)
        batch = Batch(None, None, None, None, Samples(*[None] * 6, params=["a", "b"]), 0)
        first, second = runner.submit(batch), runner.submit(batch)
        assert first.result() == "tokens"
        with pytest.raises(WorkerError, match="memory ran out in a step"):
            second.result()
    steps = [["a", "b"], "submit", None, "submit"]  # parameters that are known are not told
    assert told.events == [*steps, "result", "result", "end"]


class Blocks:
    """Processes that get at most so many blocks: this one or workers."""

    def __init__(self, *most):
        self.most, self.num_blocks = most, None

    def shrink(self, num_blocks):
        self.tell(Shrink(num_blocks))
        return self.ready()[0]

    def tell(self, message):
        self.num_blocks = [min(message.num_blocks, most) for most in self.most]

    def ready(self):
        return self.num_blocks


def test_all_have_as_many_blocks_as_the_one_that_has_least():
    here, workers = Blocks(9), Blocks(7, 8)
    assert TensorParallelRunner(here, workers).shrink(8) == 7
    assert (here.num_blocks, workers.num_blocks) == ([7], [7, 7])
    assert in_shards(3, lambda shard: shard.least([5, 3, 4][shard.rank])) == [3, 3, 3]


def test_a_group_that_waits_for_ever_is_aborted(model, monkeypatch):
    class Group:
        def abort(self):
            aborted.set()

    aborted = Event()
    monkeypatch.setattr("batchllm.runner.workers._MODULE", "nowhere_to_be_found")
    with closing(
        Workers(ModelSource(str(model)), EngineConfig(tensor_parallel_size=2), 99)
    ) as workers:
        workers.abort_when_lost(Group())
        assert aborted.wait(30)
        with pytest.raises(WorkerError, match="rank 1 ended with exit code 1"), workers.in_step():
            pass


class Failing:
    """A worker of which nothing is heard at first."""

    def __init__(self, *heard):
        self._heard = iter([None, *heard])

    def failure(self):
        return next(self._heard)

    def close(self):
        pass


def test_who_was_left_alone_is_not_to_blame(model):
    lost, killed = PeerLostError("gone"), WorkerKilledError("rank 2 was ended")
    with closing(Workers(ModelSource(str(model)), EngineConfig(), 99)) as workers:
        workers._children += [Failing(lost), Failing(None, None, killed), Failing(lost)]
        assert workers.blame(PeerLostError("connection reset")) is killed
        workers._children[:] = [Failing(lost), Failing(lost)]
        assert "lost each other: connection reset" in str(
            workers.blame(PeerLostError("connection reset"))
        )


def test_what_cannot_be_shared_is_refused_before_a_process_is_started(model):
    with pytest.raises(UsageError, match="2 key-value heads can only be divided among 1, 2"):
        LLM(model, tensor_parallel_size=3)
    with pytest.raises(UsageError, match="deterministic needs 1"):
        LLM(model, tensor_parallel_size=2, deterministic=True)
    assert psutil.Process().children() == []


@pytest.mark.slow
def test_the_default_model_answers_alike_in_three():
    """Nine heads and three key-value heads; greedy, but where rounding decides."""
    rows = pq.read_table(Path(__file__).parents[2] / "datasets" / "example.parquet")
    prompts = [f"{text[:200]}\n\nWhat is this about?" for text in rows["text"].to_pylist()[:4]]
    params = SamplingParams(max_tokens=5)
    options = {"dtype": "float32", "kv_memory": 256 << 20, "max_model_len": 512}
    one = LLM(**options)
    with closing(LLM(tensor_parallel_size=3, **options)) as three:
        found = [o.output_token_ids.tolist() for o in three.generate(prompts, params)]
    for index, output in enumerate(one.generate(prompts, params)):
        ours, theirs = found[index], output.output_token_ids.tolist()
        if ours != theirs:
            at = next(
                i for i, pair in enumerate(zip(ours, theirs, strict=False)) if len(set(pair)) > 1
            )
            logits = logits_after(one, prompts[index], theirs[:at])
            assert abs(logits[ours[at]] - logits[theirs[at]]) < 1e-3, (index, ours, theirs)


def logits_after(llm, prompt, answer):
    """Of the token after a prompt, in the chat template, and the beginning of an answer."""
    table = pa.table({"prompt": [prompt]})
    (request,), _ = llm._build(table, PromptSpec(prompt_column="prompt")).requests(
        SamplingParams(), np.arange(1)
    )
    tokens = np.concatenate([request.prompt_token_ids, np.array(answer, np.int32)])
    scheduler = llm.new_scheduler()
    scheduler.add(plan_requests([replace(request, prompt_token_ids=tokens)]))
    step = build_model_input(scheduler.schedule(), llm.config.block_size)
    return llm.runner.logits(step)[0].tolist()
