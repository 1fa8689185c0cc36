"""The GPU's runner, on the CPU, against the CPU's: the same tokens, and nothing that would wait."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from device_steps import (
    BLOCK_SIZE,
    MAX_NUM_SEQS,
    NUM_BLOCKS,
    POISON,
    Both,
    DenseBackend,
    LateStream,
    NoWaiting,
    TapeRecorder,
    cache_of,
    requests,
    tiny_model,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchllm.models.device_operations import DeviceOperations
from batchllm.models.operations import TorchOperations
from batchllm.runner import decode_graphs
from batchllm.runner.decode_graphs import row_sizes
from batchllm.runner.device import CpuDevice
from batchllm.runner.device_runner import DeviceRunner
from batchllm.runner.nano_batches import NanoBatching
from batchllm.runner.token_feed import TokenFeed
from batchllm.scheduler.batch import NO_TOKEN, Carried

ROWS = st.lists(
    st.tuples(
        st.lists(st.sampled_from([0, 1] * 9 + [POISON]), min_size=1, max_size=20),
        st.integers(1, 9),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=12,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small operations are the faster for having no other threads to wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return tiny_model(TorchOperations())


@pytest.fixture(scope="module")
def device_model():
    return tiny_model(DeviceOperations())


def device_runner(model, backend, recorder=None, nano_batching=None):
    return DeviceRunner(
        model,
        cache_of(model, NUM_BLOCKS + 1),
        backend,
        DeviceOperations(),
        CpuDevice(),
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        recorder=recorder,
        nano_batching=nano_batching,
    )


def in_halves(stream, pays=lambda batch: True):
    return NanoBatching(DenseBackend(), stream, pays)


@given(ROWS, st.integers(1, 50))
@example([([0, 1, 0], 3, 0), ([0, POISON], 3, 1), ([0, POISON], 3, 0)], 1)
@settings(max_examples=12)
def test_it_samples_what_the_cpu_runner_does(model, device_model, rows, budget):
    runner = device_runner(device_model, DenseBackend())
    assert Both(model, runner).run(requests(rows), budget).steps > 0


@given(ROWS, st.integers(2, 50), st.booleans())
@example([([0, 1, 0], 3, 0), ([0, POISON], 3, 1), ([0, POISON], 3, 0)], 30, True)
@settings(max_examples=10)
def test_halves_sample_the_same_however_late_attention_is(model, device_model, rows, budget, late):
    stream = LateStream() if late else CpuDevice().side_stream()
    runner = device_runner(device_model, DenseBackend(), nano_batching=in_halves(stream))
    assert Both(model, runner).run(requests(rows), budget).steps > 0
    if late:
        assert stream.waiting == [] and stream.starts % 4 == 0 and stream.most_waiting <= 2


def test_steps_are_run_in_halves_where_it_pays(model, device_model, monkeypatch):
    monkeypatch.setattr(decode_graphs, "_RUNS_BEFORE", 1)
    rows = [([i % 3, 1, 0] * (1 + i % 4), 9 + i, i % 4) for i in range(12)]
    stream, recorder = LateStream(), TapeRecorder()
    asked = []

    def pays(batch):
        asked.append(batch.num_tokens)
        return len(asked) % 3 != 0

    whole, nano_batching = DenseBackend(), in_halves(stream, pays)
    both = Both(model, device_runner(device_model, whole, recorder, nano_batching))
    for _ in range(2):
        both.run(requests(rows))
    assert len(asked) > 20 and min(asked) > 1
    # Recorded, both ways; what is replayed starts nothing anew.
    assert whole.updates > 3 and nano_batching.backend.updates > 6
    assert recorder.replays > 6
    by_hand = stream.starts / (2 * 2)  # of the halves and the layers
    assert 3 < by_hand < sum(i % 3 != 2 for i in range(len(asked)))
    assert stream.most_waiting == 2, "attention of one half waits while the other goes on"
    both.runner.run_whole()
    starts = stream.starts
    both.run(requests(rows))
    assert stream.starts == starts


@pytest.mark.parametrize("kind", ["greedy", "drawn", "mixed"])
def test_recorded_decodes_sample_the_same(model, device_model, kind, monkeypatch):
    monkeypatch.setattr(decode_graphs, "_RUNS_BEFORE", 2)
    which = {"greedy": [0], "drawn": [1, 2, 3], "mixed": range(4)}[kind]
    rng = np.random.default_rng(0)
    rows = [
        (rng.integers(0, 9, rng.integers(1, 12)).tolist(), 4 + i, which[i % len(which)])
        for i in range(19)
    ]
    recorder, backend = TapeRecorder(), DenseBackend()
    both = Both(model, device_runner(device_model, backend, recorder)).run(requests(rows))
    assert both.num_carried > 100
    # Sizes come a few times each: twice as they are, once to be recorded, then from the recording.
    assert recorder.records >= 2 and recorder.replays >= 3
    assert backend.updates == recorder.records + recorder.replays
    recorded = recorder.records
    both.run(requests(rows))
    assert recorder.replays > 10 and recorder.records < 2 * recorded + 3


def test_the_step_waits_for_nothing(device_model, model, monkeypatch):
    monkeypatch.setattr(decode_graphs, "_RUNS_BEFORE", 2)
    rows = [([i % 3, 1, 0] * (1 + i % 4), 3 + i, i % 4) for i in range(12)]

    class Watched(DeviceRunner):
        def submit(self, batch):
            with NoWaiting():
                return super().submit(batch)

    for recorder in (None, TapeRecorder()):
        runner = device_runner(device_model, DenseBackend(), recorder)
        runner.__class__ = Watched
        assert Both(model, runner).run(requests(rows)).steps > 10


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_the_watch_for_waiting_sees_what_waits(mode):
    values = torch.arange(4.0)
    for waits in (
        lambda: values[0].item(),
        lambda: values[values > 1],
        lambda: torch.tensor([1, 2]),
        lambda: values.nonzero(),
        lambda: bool(values[0] > 1),
        lambda: torch.where(values > 1),
        lambda: values.masked_select(values > 1),
    ):
        with pytest.raises(AssertionError, match="waits"), NoWaiting(), mode():
            waits()


def test_the_recorder_reads_the_memory_that_was_recorded():
    fixed, result, kept = torch.ones(4), torch.zeros(4), []

    def call():
        made = kept_source[0] * 2
        result[:] = made + 1
        kept.append(made)

    kept_source = [fixed]
    replay = TapeRecorder().record(call)
    fixed.fill_(5)
    kept_source[0] = torch.zeros(4)
    replay()
    assert result.tolist() == [11] * 4
    assert len(kept) == 1 and kept[0].tolist() != [10] * 4, "what a recording makes is not to keep"


def test_a_smaller_cache_forgets_the_recordings(model, device_model, monkeypatch):
    monkeypatch.setattr(decode_graphs, "_RUNS_BEFORE", 0)
    recorder = TapeRecorder()
    runner = device_runner(device_model, DenseBackend(), recorder)
    rows = [([1, 0, i % 2], 6, 0) for i in range(7)]
    Both(model, runner).run(requests(rows))
    recorded = recorder.records
    assert recorded > 0
    assert runner.resize(NUM_BLOCKS // 2) == NUM_BLOCKS // 2 == runner.num_blocks
    assert recorder.forgotten == 1
    Both(model, runner).run(requests(rows))
    assert recorder.records == 2 * recorded


def test_greedy_and_drawn_steps_of_one_size_have_a_recording_each(model, device_model, monkeypatch):
    monkeypatch.setattr(decode_graphs, "_RUNS_BEFORE", 0)
    recorder = TapeRecorder()
    both = Both(model, device_runner(device_model, DenseBackend(), recorder))
    for which in (0, 1, 0, 1):
        both.run(requests([([1, i, 5], 6, which) for i in range(7)]))
    assert recorder.records == 2 and recorder.replays > 10


def test_tokens_are_fed_to_the_next_step_and_failed_ones_feed_zero():
    feed = TokenFeed(4, torch.device("cpu"))
    feed.keep(torch.tensor([7, NO_TOKEN, 9], dtype=torch.int32))
    batch = SimpleNamespace(
        token_ids=np.array([5, 0, 0, 6, 0], np.int32),
        carried=Carried(np.array([1, 2, 4]), np.array([2, 1, 0])),
    )
    sources = torch.from_numpy(feed.sources(batch))
    assert feed.add(torch.from_numpy(batch.token_ids), sources).tolist() == [5, 9, 0, 6, 7]


def test_a_context_that_does_not_fit_a_recording_is_run_without(model, device_model, monkeypatch):
    monkeypatch.setattr(decode_graphs, "_RUNS_BEFORE", 0)
    recorder, backend = TapeRecorder(), DenseBackend(width=14)
    rows = [([1, 0] * 4 + [i % 2], 12, 0) for i in range(5)]
    both = Both(model, device_runner(device_model, backend, recorder)).run(requests(rows))
    assert 0 < backend.updates < 12
    assert backend.refusals == both.decode_steps - backend.updates  # each asked for once


def test_batches_are_filled_up_to_few_sizes():
    for most in (1, 3, 10, 300, 4096):
        sizes = row_sizes(most).tolist()
        assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == most
    sizes = row_sizes(4096)
    assert len(sizes) < 80
    rows = np.arange(1, 4097)
    filled = sizes[sizes.searchsorted(rows)]
    assert (filled - rows < 128).all()
    assert (filled[64:] <= 1.15 * rows[64:]).all()
