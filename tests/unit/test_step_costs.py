"""What steps of attention cost, found again from the times of a device that has such costs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_trees import trees
from hypothesis import given

from batchllm.attention import mixed, timing
from batchllm.attention.backend import Heads
from batchllm.attention.sample_items import grouped, lone
from batchllm.attention.step_costs import StepCosts, counts_of, measure_step_costs, sample_steps
from batchllm.least_squares import least_squares


@given(trees(4, most_tokens=12))
def test_counts_are_those_of_every_query(items):
    num_queries = int(items.query_end.max())
    chunks = shared = reads = 0
    for item in range(len(items)):
        size = int(items.query_end[item] - items.query_begin[item])
        length, own = int(items.kv_len[item]), bool(items.own[item])
        seen = [length - (size - 1 - i) if own else length for i in range(size)]
        reads += length
        if not own:
            shared += sum(seen)
        elif size > 1:
            chunks += sum(seen)
    assert counts_of(items, num_queries).tolist() == [
        *(1, num_queries, chunks, shared, reads, len(items))
    ]


@pytest.mark.parametrize(
    "truth",
    [
        [9e-6, 3e-9, 2e-12, 1e-12, 1.6e-9, 2e-8],
        [2e-5, 0, 1e-12, 4e-12, 2e-9, 0],
    ],
)
def test_costs_are_found_again(truth):
    truth, noise = StepCosts(np.array(truth)), np.random.default_rng(0)
    found = measure_step_costs(lambda *step: truth.seconds(*step) * noise.uniform(0.99, 1.01), 16)
    assert (found.each >= 0).all()
    others = [(lone(500, 1, 700, 16), 500), (lone(8, 256, 900, 16), 2048)]
    others.append((grouped(30, 9, 1, 900, 16), 270))
    for step in [*sample_steps(16), *others]:
        assert found.seconds(*step) == pytest.approx(truth.seconds(*step), rel=0.1)


def test_sample_steps_are_what_they_say_and_fit_a_gpu():
    for items, num_queries in sample_steps(16):
        assert items.query_end.max() == num_queries
        own = items.own
        assert (items.query_end - items.query_begin)[own].sum() == num_queries
        assert len(items.block_ids) == len(set(items.block_ids.tolist())) <= 9000
        assert (np.diff(items.block_offsets) == -(-items.kv_len // 16)).all()


def test_least_squares_has_no_negative_figure():
    rows = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
    assert least_squares(rows, rows @ [3.0, 0.5]) == pytest.approx([3.0, 0.5])
    assert least_squares(rows, rows @ [3.0, -1.0]).min() == 0


@pytest.mark.parametrize("has_memory", [True, False])
def test_both_are_timed_and_without_memory_the_first_does_it_all(monkeypatch, has_memory):
    first, second = (SimpleNamespace(name=name, granularity=1) for name in ("ours", "theirs"))
    given = Heads(8, 2, 128)
    timed = []

    def time_step(backend, sizes, items, num_queries, device, clock):
        if not has_memory:
            raise torch.OutOfMemoryError("none")
        assert sizes == mixed.Sizes(given, 16, torch.bfloat16) and str(device) == "cuda"
        timed.append(backend.name)
        return 1e-5 if (backend is first) == (len(items) < num_queries) else 2e-5

    monkeypatch.setattr(mixed, "make_cuda", lambda *sizes: first)
    monkeypatch.setattr(mixed, "make_flashinfer", lambda *sizes: second)
    monkeypatch.setattr(mixed, "time_step", time_step)
    made = mixed.make_mixed(16, given, None)
    if not has_memory:
        assert made is first
        return
    count = len(sample_steps(16))
    assert timed == ["ours"] * count + ["theirs"] * count
    assert made.name == "ours or theirs"


class Shared:
    """A backend whose time on a share of the device is known."""

    def __init__(self, share=1.0):
        self.share = share

    def on_share(self, share):
        assert self.share == 1.0
        return Shared(share)


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({0.2: 0.3, 0.3: 0.6, 0.4: 0.7, 0.5: 0.8, 0.6: 0.9}, (0.3, 0.6)),
        ({0.2: 0.2, 0.3: 0.3, 0.4: 0.9, 0.5: 1.2, 0.6: 1.3}, (0.4, 0.9)),
        ({0.2: 0.1, 0.3: 0.2, 0.4: 0.3, 0.5: 1.2, 0.6: 1.3}, (0.5, 1.0)),
    ],
)
def test_attentions_share_is_what_reads_most_for_what_it_takes(monkeypatch, speeds, expected):
    def time_step(backend, sizes, items, num_queries, device, clock):
        assert num_queries == len(items) and items.kv_len.min() >= 1024
        return 1e-3 / {1.0: 1.0, **speeds}[backend.share]

    monkeypatch.setattr(timing, "time_step", time_step)
    sizes = timing.Sizes(Heads(8, 2, 128), 16, torch.bfloat16)
    share, speed = timing.measure_share(Shared(), sizes, torch.device("cpu"), None)
    assert (share, speed) == pytest.approx(expected)


def test_without_memory_nothing_is_shared(monkeypatch):
    def time_step(*_):
        raise torch.OutOfMemoryError("none")

    monkeypatch.setattr(timing, "time_step", time_step)
    sizes = timing.Sizes(Heads(8, 2, 128), 16, torch.bfloat16)
    assert timing.measure_share(Shared(), sizes, torch.device("cpu"), None) is None
