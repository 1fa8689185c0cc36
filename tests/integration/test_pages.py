"""Memory for weights, in large pages."""

import pytest
import torch

from batchllm.native import pages
from batchllm.native.pages import Slabs


def test_pieces_are_apart_and_begin_lines():
    slabs = Slabs()
    pieces = [slabs.take(size) for size in (1, 64, 100, 7, 4096)]
    for i, piece in enumerate(pieces):
        assert piece.dtype == torch.uint8 and piece.data_ptr() % 64 == 0
        piece.fill_(i)
    assert [len(piece) for piece in pieces] == [1, 64, 100, 7, 4096]
    assert all((piece == i).all() for i, piece in enumerate(pieces))


def test_what_is_larger_than_a_slab_gets_one_of_its_own(monkeypatch):
    monkeypatch.setattr(pages, "_SLAB_BYTES", 256)
    slabs = Slabs()
    pieces = [slabs.take(size) for size in (64, 400, 64, 252, 4)]
    for i, piece in enumerate(pieces):
        piece.fill_(i)
    assert [len(piece) for piece in pieces] == [64, 400, 64, 252, 4]
    assert all((piece == i).all() for i, piece in enumerate(pieces))


@pytest.mark.parametrize("size", [60, 0])
def test_small_pages_do_where_the_system_gives_no_large_ones(monkeypatch, size):
    def none(shape, dtype):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pages, "zero_pages", none)
    assert Slabs().take(size).shape == (size,)
