"""The runner on a GPU: the CPU's tokens, with recorded decodes and without, waiting for nothing."""

import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from builders import tiny_config, write_safetensors_model
from device_steps import (
    BLOCK_SIZE,
    MAX_NUM_SEQS,
    NUM_BLOCKS,
    Both,
    DenseBackend,
    cache_of,
    carrying,
    requests,
    run_all,
    tiny_model,
)
from oracle import check_greedy, load_gguf_model

from batchllm import LLM, SamplingParams
from batchllm.attention.cuda_library import load_cuda_library
from batchllm.errors import UsageError
from batchllm.models.device_operations import DeviceOperations
from batchllm.models.locate import installed
from batchllm.models.operations import TorchOperations
from batchllm.runner import decode_graphs, load_device
from batchllm.runner.device import CudaDevice
from batchllm.runner.device_runner import DeviceRunner
from batchllm.runner.graphs import CudaGraphs
from batchllm.runner.nano_batches import NanoBatching

PROMPTS = [f"the same beginning, number {i % 7} {'x' * (i % 5)}" for i in range(30)]
pytestmark = pytest.mark.gpu

TEXTS = [
    f"{start} {end}"
    for start in ("The capital of France is a city that", "Water boils at a temperature that")
    for end in ("is", "has", "was known for", "can be", "people like, and it")
]
SMALL = {"max_num_batched_tokens": 128, "max_num_seqs": 32, "kv_memory": 64 << 20}


@contextmanager
def waiting_is_an_error():
    """As far as torch tells; it does not of events that are waited for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def without_flashinfer(monkeypatch):
    """It compiles kernels where they are first used, for minutes, and has tests of its own."""
    monkeypatch.setattr(load_device, "_flashinfer", lambda backend: None)


@pytest.fixture(scope="module")
def default_model():
    path = next(model.path for model in installed() if model.is_default)
    return path or pytest.skip("the default model is not in the cache")


class Recorder(CudaGraphs):
    """Counts."""

    def __init__(self):
        super().__init__()
        self.records = self.replays = 0

    def record(self, call):
        replay = super().record(call)
        self.records += 1

        def counted():
            self.replays += 1
            replay()

        return counted


def device_runner(recorder, *, in_halves=False):
    device = CudaDevice()
    nano_batching = NanoBatching(DenseBackend(), device.side_stream(), lambda batch: in_halves)
    model = tiny_model(DeviceOperations(), device.torch_device)
    return DeviceRunner(
        model,
        cache_of(model, NUM_BLOCKS + 1, device.torch_device),
        DenseBackend(),
        DeviceOperations(),
        device,
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        recorder=recorder,
        nano_batching=nano_batching,
    )


def rows(count=19, kinds=(0,)):
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, 2, rng.integers(1, 12)).tolist(), 4 + i, kinds[i % len(kinds)])
        for i in range(count)
    ]


@pytest.mark.parametrize("in_halves", [False, True])
@pytest.mark.parametrize("is_recorded", [False, True])
def test_greedy_tokens_are_the_cpus_and_nothing_waits(is_recorded, in_halves, monkeypatch):
    monkeypatch.setattr(decode_graphs, "_RUNS_BEFORE", 1)
    recorder = Recorder() if is_recorded else None
    both = Both(tiny_model(TorchOperations()), device_runner(recorder, in_halves=in_halves))
    both.run(requests(rows()))  # what is loaded or tuned at its first use may wait
    with waiting_is_an_error():
        both.run(requests(rows()))
    assert both.num_carried > 100
    if is_recorded:
        assert recorder.replays > 10


def test_the_sync_debug_mode_sees_what_waits():
    values = torch.arange(4, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_is_an_error():
        values.sum().item()


def test_drawn_tokens_are_the_same_from_recordings(monkeypatch):
    """Rounding may differ with the number of rows, so nearly all."""
    monkeypatch.setattr(decode_graphs, "_RUNS_BEFORE", 1)
    recorder = Recorder()
    plain, recorded = device_runner(None), device_runner(recorder)
    given = requests(rows(kinds=(1, 2, 3)))
    steps = []

    class Pair:
        def execute(self, batch):
            expected, got = plain.execute(batch), recorded.execute(batch)
            steps.append((got.token_ids == expected.token_ids).mean())
            return expected

    for _ in range(3):
        run_all(given, Pair())
    assert recorder.replays > 10
    assert np.mean(steps) > 0.97


def test_steps_go_on_after_the_cache_moved(monkeypatch):
    monkeypatch.setattr(decode_graphs, "_RUNS_BEFORE", 1)
    recorder, cpu_model = Recorder(), tiny_model(TorchOperations())
    runner = device_runner(recorder)
    Both(cpu_model, runner).run(requests(rows()))
    assert runner.shrink(NUM_BLOCKS) == NUM_BLOCKS
    before = recorder.records
    both = Both(cpu_model, runner)
    for _ in range(3):
        both.run(requests(rows()))
    assert before > 0 and recorder.records > before


def test_tokens_arrive_in_order_when_steps_are_submitted_ahead():
    """A long queue of steps, each fed by the one before, read only at the end."""
    runner = device_runner(None)
    expected, batches = [], []

    class Keep:
        def execute(self, batch):
            batches.append(batch)
            expected.append(runner.execute(batch))
            return expected[-1]

    run_all(requests(rows()), Keep())
    runner.shrink(NUM_BLOCKS)
    previous, pending = None, []
    for batch in batches:
        pending.append(runner.submit(carrying(batch, previous)))
        previous = batch
    for step, want in zip(pending, expected, strict=True):
        np.testing.assert_array_equal(step.result().token_ids, want.token_ids)


@pytest.fixture
def needs_kernels():
    try:
        load_cuda_library()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A random model with heads that kernels take."""
    config = tiny_config(
        max_position_embeddings=512, head_dim=64, num_attention_heads=8, num_key_value_heads=2
    )
    return write_safetensors_model(tmp_path_factory.mktemp("models") / "small", config=config)


def test_a_model_answers_as_on_the_cpu(small_model):
    params = SamplingParams(max_tokens=12)
    options = SMALL | {"dtype": "float32"}
    expected = LLM(small_model, device="cpu", **options).generate(PROMPTS, params)
    llm = LLM(small_model, device="cuda", attention_backend="reference", **options)
    assert torch.cuda.get_device_name() in llm.describe()
    assert [o.text for o in llm.generate(PROMPTS, params)] == [o.text for o in expected]


def test_the_kernels_answer_nearly_as_the_reference(small_model, needs_kernels):
    """In bfloat16 the weights of noise leave many tokens within rounding of another."""
    options, params = SMALL | {"device": "cuda"}, SamplingParams(max_tokens=4)
    first = [
        [
            o.output_token_ids[:1].tolist()
            for o in LLM(small_model, attention_backend=name, **options).generate(PROMPTS, params)
        ]
        for name in ("reference", "cuda")
    ]
    assert np.mean([a == b for a, b in zip(*first, strict=True)]) > 0.8


def test_the_pool_takes_what_is_free(tmp_path):
    heads = {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 128}
    model = write_safetensors_model(
        tmp_path / "wide", config=tiny_config(max_position_embeddings=65536, **heads)
    )
    free, _ = torch.cuda.mem_get_info()
    options = {"max_num_batched_tokens": 256, "max_num_seqs": 256}
    llm = LLM(model, device="cuda", attention_backend="reference", **options)
    taken = free - torch.cuda.mem_get_info()[0]
    assert 0.85 * free < llm.kv_memory <= taken


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("in_halves", [False, True])
def test_the_default_model_is_greedy(default_model, needs_kernels, in_halves, monkeypatch):
    pytest.importorskip("transformers")
    if in_halves:
        monkeypatch.setattr(load_device, "are_faster", lambda *args: True)
        monkeypatch.setattr(load_device, "_pays", lambda costs, batch: batch.num_tokens > 1)
    oracle, truth = (load_gguf_model(default_model, k) for k in (torch.bfloat16, torch.float32))
    llm = LLM(default_model, device="cuda", attention_backend="cuda", kv_memory=1 << 30)
    assert llm.loaded.overlap or not in_halves
    prompts = list(llm.tokenizer.encode_batch(TEXTS, add_special_tokens=False))
    prompts = [prompt.tolist() for prompt in prompts]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=12))
    different, eos = 0, set(llm.tokenizer.eos_token_ids)
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.output_token_ids.tolist()
        different += check_greedy(oracle, truth, eos, prompt, answer, 12)
    print(f"{different} tokens differ, all within rounding")


def test_the_default_model_in_float32_answers_as_on_the_cpu(default_model):
    options = SMALL | {"dtype": "float32"}
    texts, params = TEXTS[:4], SamplingParams(max_tokens=8)
    expected = LLM(default_model, device="cpu", **options).generate(texts, params)
    llm = LLM(default_model, device="cuda", attention_backend="reference", **options)
    got = llm.generate(texts, params)
    assert [o.text for o in got] == [o.text for o in expected]
