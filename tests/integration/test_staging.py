"""Arrays packed for the device: what arrives, where, and when their memory is used again."""

import numpy as np
import pytest
import torch

from batchllm.runner.device import CpuDevice
from batchllm.runner.staging import FixedStager, Mirror, Stager, put_now


class LateDevice(CpuDevice):
    """Its events say when a copy has begun that nobody waited for yet."""

    def __init__(self):
        self.events = []

    def event(self):
        self.events.append(LateEvent())
        return self.events[-1]


class LateEvent:
    is_open = False

    def record(self):
        self.is_open = True

    def synchronize(self):
        self.is_open = False


def arrays(rng, count):
    kinds = (np.int32, np.int64, np.float32, np.float64, np.bool_, np.uint8)
    return [
        rng.integers(0, 100, rng.integers(0, 4, 2) * [1, 7]).astype(kinds[i % len(kinds)])
        for i in range(count)
    ]


def test_what_is_put_arrives_with_type_and_shape_whatever_the_room():
    rng = np.random.default_rng(0)
    stager = Stager(CpuDevice(), num_bytes=1000)
    for _ in range(20):
        given = arrays(rng, int(rng.integers(1, 30)))
        tensors = [stager.put(array) for array in given]
        kept = [array.copy() for array in given]
        for array in given:
            array[...] = 0  # its memory is the caller's again
        stager.send()
        for array, tensor in zip(kept, tensors, strict=True):
            torch.testing.assert_close(tensor, torch.from_numpy(array))
            assert tensor.data_ptr() % 16 == 0


def test_a_step_is_one_copy_once_there_is_room(monkeypatch):
    sent = []
    send = Mirror.send
    monkeypatch.setattr(
        Mirror, "send", lambda self, begin, end: (sent.append(end - begin), send(self, begin, end))
    )
    stager = Stager(CpuDevice(), num_bytes=100)
    for step in range(3):
        tensors = [stager.put(np.full(20, i)) for i in range(5)]
        stager.send()
        assert [int(tensor[0]) for tensor in tensors] == list(range(5))
        assert len(sent) > 1 if step == 0 else len(sent) == 1  # the first outgrows its memory
        sent.clear()


def test_a_host_buffer_is_not_written_before_it_is_copied():
    device = LateDevice()
    mirror = Mirror(device, 64)
    for step in range(6):
        assert not device.events[step % 2].is_open, "the device may still have to copy this one"
        mirror.write(0, np.full(8, step))
        mirror.send(0, 64)
        assert device.events[step % 2].is_open, "waited for the copy just begun"


def test_places_stay_where_they_are_and_take_prefixes():
    device = CpuDevice()
    stager = FixedStager(device, num_bytes=512)
    few, many = stager.reserve(4, np.int32), stager.reserve(100, np.int64)  # on two pages
    where = few.tensor.data_ptr(), many.tensor.data_ptr()
    for count in (4, 1, 3):
        few.fill(np.arange(count, dtype=np.int32) + count)
        many.fill(np.arange(20 * count) - count)
        stager.send()
        assert few.tensor[:count].tolist() == list(range(count, 2 * count))
        assert many.tensor[: 20 * count].tolist() == list(range(-count, 19 * count))
    assert where == (few.tensor.data_ptr(), many.tensor.data_ptr())


def test_a_place_refuses_what_it_was_not_made_for():
    place = FixedStager(CpuDevice()).reserve(4, np.int32)
    with pytest.raises(AssertionError):
        place.fill(np.zeros(5, np.int32))
    with pytest.raises(AssertionError):
        place.fill(np.zeros(4, np.int64))


def test_put_now_is_there_at_once():
    assert put_now(torch.device("cpu"))(np.arange(3)).tolist() == [0, 1, 2]
