"""The emulation of CUDA finds what is wrong with kernels, and nothing in right ones."""

import ctypes

import numpy as np
import pytest
import torch
from emulated import compile_emulated

THREADS = 64


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    library = ctypes.CDLL(
        str(compile_emulated("tests/cuda/faults.cu", tmp_path_factory.mktemp("faults")))
    )
    library.run_case.restype = library.run_multiply.restype = ctypes.c_char_p
    library.conflicts_of_last.restype = ctypes.c_long
    return library


def run(library, name, shared_bytes=4 * THREADS):
    numbers = np.full(2 * THREADS, -1, dtype=np.int32)
    halves = np.zeros(1024, dtype=np.uint16)
    error = library.run_case(
        name.encode(),
        shared_bytes,
        numbers.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_long(len(numbers)),
        halves.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_long(len(halves)),
    )
    return error and error.decode(), numbers


def test_a_right_kernel_runs_in_every_block(library):
    error, numbers = run(library, "in_order")
    assert error is None
    assert numbers.tolist() == list(range(THREADS))[::-1] * 2


@pytest.mark.parametrize(
    "name, finding",
    [
        ("no_barrier_before_read", "with no barrier between"),
        ("no_barrier_before_write", "written, and read by another thread with no barrier"),
        ("two_writers", "written, and written by another thread with no barrier"),
        ("behind_shared_memory", "shared memory written out of bounds"),
        ("behind_global_memory", "global memory: [128, 129) of 128"),
        ("never_written", "read, but never written"),
        ("copy_not_waited_for", "read before the copy was waited for"),
        ("copy_seen_without_a_barrier", "read and written by thread 0 with no barrier"),
        ("not_aligned", "not aligned"),
        ("half_a_warp", "waits for ever in shuffle_xor"),
        ("two_operations", "a warp meets in multiply_add and in shuffle_xor"),
        ("not_all_at_the_barrier", "waits for ever in barrier"),
    ],
)
def test_a_wrong_kernel_is_found(library, name, finding):
    shared_bytes = 1024 if name == "not_aligned" else 4 * THREADS
    error, _ = run(library, name, shared_bytes)
    assert error is not None and finding in error, error
    assert run(library, "in_order")[0] is None  # and the next one is not disturbed


def test_bank_conflicts_are_counted(library):
    error, _ = run(library, "bank_conflicts", shared_bytes=THREADS * 64)
    assert error is None
    # 2 blocks x 2 warps x 4 matrices, of which seven rows each come after the first.
    assert library.conflicts_of_last() == 2 * 2 * 4 * 7


def test_a_product_of_fragments_is_a_matrix_product(library):
    torch.manual_seed(0)
    a = torch.randint(-8, 8, (16, 16)).to(torch.bfloat16)
    b = torch.randint(-8, 8, (16, 8)).to(torch.bfloat16)
    halves = torch.cat([a.flatten(), b.flatten()]).view(torch.int16)
    numbers = torch.zeros(16, 8, dtype=torch.int32)
    error = library.run_multiply(
        ctypes.c_void_p(halves.data_ptr()), ctypes.c_void_p(numbers.data_ptr())
    )
    assert error is None
    assert torch.equal(numbers.double(), a.double() @ b.double())
