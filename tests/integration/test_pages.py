"""Weights in large pages."""

import pytest
import torch

from batchllm.native import pages
from batchllm.native.pages import Slabs


def test_copies_are_equal_apart_and_begin_lines():
    slabs = Slabs()
    tensors = [
        torch.randn(n, 7).to(dtype) for n in (1, 3, 50) for dtype in (torch.bfloat16, torch.float32)
    ]
    copies = [slabs.copy(tensor.T) for tensor in tensors]
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.is_contiguous() and copy.data_ptr() % 64 == 0
        assert torch.equal(copy, tensor.T)
    copies[0].zero_()
    assert all(torch.equal(copy, t.T) for t, copy in zip(tensors[1:], copies[1:], strict=True))


def test_what_is_larger_than_a_slab_gets_one_of_its_own(monkeypatch):
    monkeypatch.setattr(pages, "_SLAB_BYTES", 256)
    slabs = Slabs()
    tensors = [torch.randn(n) for n in (16, 100, 16, 63, 1)]
    copies = [slabs.copy(tensor) for tensor in tensors]
    assert all(map(torch.equal, tensors, copies))


@pytest.mark.parametrize("shape", [(3, 5), (0, 4)])
def test_small_pages_do_where_the_system_gives_no_large_ones(monkeypatch, shape):
    def none(shape, dtype):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pages, "zero_pages", none)
    tensor = torch.randn(shape)
    assert torch.equal(Slabs().copy(tensor.T), tensor.T)
