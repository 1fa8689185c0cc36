"""Loading onto a GPU, with the CPU in its place: limits, memory, and answers end to end."""

import pytest
import torch
from builders import tiny_config, write_safetensors_model
from device_steps import DenseBackend, LateStream, TapeRecorder

from batchllm import LLM, SamplingParams
from batchllm.config import EngineConfig, StepLimits
from batchllm.errors import UsageError
from batchllm.models.device_operations import DeviceOperations
from batchllm.models.operations import TorchOperations
from batchllm.runner import decode_graphs, load_device
from batchllm.runner.clock import Clock
from batchllm.runner.device import CpuDevice
from batchllm.runner.device_runner import DeviceRunner
from batchllm.runner.fullest_steps import FullestSteps
from batchllm.runner.load_device import load_on_device
from batchllm.runner.model_input import build_model_input
from batchllm.runner.nano_batches import NanoBatching, nano_batches_are_faster
from batchllm.sampling.sampler import draw_all_sorted

PROMPTS = [f"the same beginning, number {i % 7} {'x' * (i % 5)}" for i in range(14)]
PARAMS = [SamplingParams(max_tokens=8, temperature=0.9 * (i % 2), top_k=i % 3) for i in range(14)]
OPTIONS = {
    "attention_backend": "reference",
    "max_num_batched_tokens": 40,
    "max_num_seqs": 12,
    "dtype": "float32",
    "block_size": 4,
    "threads": 1,
}


class CountingDevice(CpuDevice):
    """A device with 3 MB, of which the largest step takes 1."""

    def free_memory(self):
        return 3_000_000

    def peak_memory(self, call):
        call()
        return 1_000_000


def load_as_on_a_gpu(monkeypatch, recorder=None):
    """Let what would be loaded on the CPU be loaded as on a GPU."""

    def as_on_a_gpu(checkpoint, config, max_model_len, threads, clock, shard):
        device = CountingDevice()
        return load_on_device(
            checkpoint, config, max_model_len, threads, clock, device, recorder, shard
        )

    monkeypatch.setattr("batchllm.runner.load_cpu.load_on_cpu", as_on_a_gpu)


@pytest.fixture
def on_device(monkeypatch):
    load_as_on_a_gpu(monkeypatch)


def test_answers_and_memory(on_device, tiny_model, monkeypatch):
    llm = LLM(tiny_model, **OPTIONS)
    assert isinstance(llm.runner, DeviceRunner)
    block_bytes = 4 * 2 * 2 * 2 * 16 * 4
    # All that the fullest step leaves, but one block for rows that fill up, and a margin.
    assert llm.num_kv_blocks == int((3_000_000 - 1_000_000 - block_bytes) * 0.95) // block_bytes
    assert llm.runner.num_blocks == llm.num_kv_blocks
    assert "attention reference" in llm.describe() and "CPU," in llm.describe()
    got = [o.text for o in llm.generate(PROMPTS, PARAMS)]
    monkeypatch.undo()
    expected = LLM(tiny_model, **OPTIONS | {"kv_memory": 1 << 20}).generate(PROMPTS, PARAMS)
    assert got == [o.text for o in expected]


def test_answers_from_recordings_a_step_ahead(tiny_model, monkeypatch):
    expected = LLM(tiny_model, kv_memory=1 << 20, **OPTIONS).generate(PROMPTS, PARAMS)
    recorder, backend = TapeRecorder(), DenseBackend()
    load_as_on_a_gpu(monkeypatch, recorder)
    monkeypatch.setattr(decode_graphs, "_RUNS_BEFORE", 1)
    monkeypatch.setattr(load_device, "make_backend", lambda *args, **options: backend)
    monkeypatch.setattr(load_device, "measure_share", lambda *sizes: None)
    monkeypatch.setattr(load_device, "_GRAPHS_BYTES", 1000)
    llm = LLM(tiny_model, kv_memory=200_000, **OPTIONS)
    for _ in range(2):
        got = llm.generate(PROMPTS, PARAMS)
        assert [o.text for o in got] == [o.text for o in expected]
    assert recorder.replays > 3 and backend.updates > recorder.replays


@pytest.mark.parametrize("is_faster", [True, False])
def test_halves_are_run_if_they_were_faster_when_tried(tiny_model, monkeypatch, is_faster):
    expected = LLM(tiny_model, kv_memory=1 << 20, **OPTIONS).generate(PROMPTS, PARAMS)
    stream, made = LateStream(), []
    make = load_device._nano_batching

    def noted(backend, device, costs):
        made.append(make(backend, device, costs))
        if made[0] is not None:
            assert (costs.machine.overlap_share, costs.machine.overlap_speed) == (0.3, 0.7)
        return made[0]

    def tried(submit, nano_batching, device, max_num_seqs, num_blocks, block_size):
        assert nano_batching is made[0] and device.side_stream() is stream
        assert stream.starts == 0, "memory is sized by whole steps, which take more"
        assert (max_num_seqs, block_size) == (OPTIONS["max_num_seqs"], OPTIONS["block_size"])
        assert num_blocks > 50
        return is_faster

    load_as_on_a_gpu(monkeypatch, TapeRecorder())
    monkeypatch.setattr(CountingDevice, "side_stream", lambda self: stream)
    monkeypatch.setattr(load_device, "make_backend", lambda *args, **options: DenseBackend())
    monkeypatch.setattr(load_device, "_GRAPHS_BYTES", 1000)
    monkeypatch.setattr(load_device, "_nano_batching", noted)
    monkeypatch.setattr(load_device, "_pays", lambda costs, batch: True)
    monkeypatch.setattr(load_device, "measure_share", lambda *sizes: (0.3, 0.7))
    monkeypatch.setattr(load_device, "nano_batches_are_faster", tried)
    llm = LLM(tiny_model, kv_memory=200_000, **OPTIONS)
    assert [o.text for o in llm.generate(PROMPTS, PARAMS)] == [o.text for o in expected]
    assert llm.loaded.overlap == ((0.3, 0.7) if is_faster else None)
    assert is_faster == (stream.starts > 10)
    assert ("beside products" in llm.describe()) == is_faster
    assert (llm.machine.overlap_share > 0) == is_faster
    made.clear()
    assert LLM(tiny_model, kv_memory=200_000, overlap=False, **OPTIONS).loaded.overlap is None
    assert made == [None]


@pytest.mark.parametrize(
    ("whole", "halves", "expected"), [(5, 4, True), (4, 5, False), (5, 5, False)]
)
def test_the_faster_way_is_found_by_trying(whole, halves, expected):
    now, steps = [0.0], []
    nano_batching = NanoBatching(DenseBackend(), CpuDevice().side_stream(), lambda batch: "by cost")

    def submit(batch):
        in_halves = nano_batching.pays(batch)
        first = len(steps) == 0 or steps[-1][1] != in_halves
        steps.append((batch, in_halves))
        now[0] += 100 if first else halves if in_halves else whole

    got = nano_batches_are_faster(
        submit, nano_batching, CpuDevice(), 7, 40, 4, clock=lambda: now[0]
    )
    assert got == expected
    assert nano_batching.pays(None) == "by cost"
    (batch,) = {id(batch): batch for batch, _ in steps}.values()
    step = build_model_input(batch, 4)
    assert batch.is_decode_only and batch.num_tokens == 7
    assert step.items.kv_len.tolist() == [20] * 7  # of 40 blocks of 4, five each
    assert sorted(step.items.block_ids.tolist()) == list(range(35))
    assert set(step.slots.tolist()) == {20 * i + 19 for i in range(7)}
    assert not nano_batches_are_faster(submit, nano_batching, CpuDevice(), 7, 1, 4)


def test_lack_of_memory_is_lived_with(on_device, tiny_model, monkeypatch):
    llm = LLM(tiny_model, kv_memory=1 << 20, **OPTIONS)
    expected = [o.text for o in llm.generate(PROMPTS, PARAMS)]
    blocks, submit, steps = llm.num_kv_blocks, llm.runner.submit, iter(range(10_000))

    def perhaps(batch):
        if next(steps) == 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return submit(batch)

    monkeypatch.setattr(llm.runner, "submit", perhaps)
    assert [o.text for o in llm.generate(PROMPTS, PARAMS)] == expected
    assert (llm.num_kv_blocks, llm.metrics.pool_shrinks) == (blocks // 2, 1)


def test_more_kv_than_there_is_room_for_is_refused(on_device, tiny_model):
    with pytest.raises(UsageError, match="leave --kv-memory out to take 95% of them"):
        LLM(tiny_model, kv_memory=2_500_000, **OPTIONS)


def test_a_clock_waits_for_the_device(on_device, tiny_model, monkeypatch):
    waits = []
    monkeypatch.setattr(CountingDevice, "synchronize", lambda self: waits.append(1))
    clock = Clock()
    llm = LLM(tiny_model, clock=clock, kv_memory=1 << 20, **OPTIONS)
    waits.clear()
    llm.generate(PROMPTS[:1], SamplingParams(max_tokens=1))
    assert len(waits) > 10 and clock.seconds["attention"] > 0


@pytest.mark.parametrize("max_model_len", [30, 1000])
def test_the_fullest_steps_are_within_their_limits(max_model_len):
    limits = StepLimits(max_num_batched_tokens=100, max_num_seqs=24)
    steps = FullestSteps.of(limits, max_model_len, 16)
    for step, samples in ((steps.prompts, -(-100 // max_model_len)), (steps.sampling, 24)):
        assert (step.num_tokens, len(step.samples)) == (100, samples)
        assert step.chunks.count.max() <= max_model_len
    assert (steps.decodes.num_tokens, len(steps.decodes.samples)) == (24, 24)
    for step in (steps.prompts, steps.sampling, steps.decodes):
        slots = build_model_input(step, 16).slots
        assert len(set(slots.tolist())) == step.num_tokens
        assert slots.max() < 16 * steps.num_blocks


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_int8_products_are_those_of_the_cpu_whatever_the_sizes(rows, bias):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(13, 21, generator=generator)
    added = torch.randn(13, generator=generator) if bias else None
    x = torch.randn(rows, 21, generator=generator)
    expected = TorchOperations().pack_int8(weight, added)(x)
    torch.testing.assert_close(DeviceOperations().pack_int8(weight, added)(x), expected)


def test_int8_products_keep_to_what_a_gpu_takes(monkeypatch):
    multiply, sizes = torch._int_mm, []

    def strict(a, b):
        sizes.append((a.shape, b.shape))
        assert a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
        assert b.T.is_contiguous()  # rows of the weight one behind the other
        return multiply(a, b)

    monkeypatch.setattr(torch, "_int_mm", strict)
    product = DeviceOperations().pack_int8(torch.randn(13, 21), None)
    for rows in (1, 16, 17, 40):
        assert product(torch.randn(rows, 21)).shape == (rows, 13)
    assert len(sizes) == 4


def test_float32_on_a_gpu_is_refused_but_for_the_reference(tiny_model, monkeypatch):
    class Elsewhere(CpuDevice):
        torch_device = torch.device("cuda")

    monkeypatch.setattr("batchllm.runner.load.choose_device", lambda asked: "cuda")
    monkeypatch.setattr("batchllm.runner.load_device.CudaDevice", Elsewhere)
    monkeypatch.setattr("batchllm.runner.load_device.CudaGraphs", lambda: None)
    with pytest.raises(UsageError, match="computes in bfloat16"):
        LLM(tiny_model, dtype="float32")
    with pytest.raises(UsageError, match=r"no fast attention runs on device 'cuda'; cuda: "):
        LLM(tiny_model, dtype="bfloat16")


def test_a_step_that_never_fits_says_what_to_do(tmp_path, monkeypatch):
    model = write_safetensors_model(tmp_path / "model", config=tiny_config())

    def never(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("batchllm.runner.load.choose_device", lambda asked: "cuda")
    monkeypatch.setattr("batchllm.runner.load_device.CudaDevice", CpuDevice)
    monkeypatch.setattr("batchllm.runner.load_device.CudaGraphs", lambda: None)
    monkeypatch.setattr("batchllm.runner.load_device.load_model", never)
    with pytest.raises(UsageError, match="--max-num-batched-tokens"):
        LLM(model, config=EngineConfig(attention_backend="reference"))


@pytest.mark.parametrize("error", [RuntimeError("ninja failed"), OSError("no nvcc"), None])
def test_flashinfers_row_kernels_are_taken_where_they_compile(
    on_device, tiny_model, monkeypatch, error
):
    taken = []

    class Library:
        @staticmethod
        def rmsnorm(rows, weight):
            if error is not None:
                raise error

    def operations(within, library):
        taken.append(library)
        return within

    monkeypatch.setattr(load_device, "load_flashinfer", lambda: Library)
    monkeypatch.setattr(load_device, "FlashInferOperations", operations)
    monkeypatch.setattr(load_device, "FlashInferDraw", lambda library: draw_all_sorted)
    LLM(tiny_model, **OPTIONS)
    assert taken == ([Library] if error is None else [])
