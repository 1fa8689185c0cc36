"""How much memory the KV cache may take."""

import psutil
import pytest
from cgroups import FakeMachine

from batchllm.cache.memory import free_memory, num_kv_blocks, ran_out_of_memory
from batchllm.errors import UsageError

UNLIMITED_V1 = "9223372036854771712"


@pytest.fixture
def machine(tmp_path):
    return FakeMachine(tmp_path)


@pytest.fixture(autouse=True)
def available(monkeypatch):
    """Bytes that the machine itself has."""

    class Memory:
        available = 100_000

    monkeypatch.setattr(psutil, "virtual_memory", Memory)


def test_kv_memory_is_half_of_what_is_free_unless_given():
    assert num_kv_blocks(None, 10, 1000) == 50
    assert num_kv_blocks(200, 10, 1000) == 20
    with pytest.raises(UsageError, match="are free; ask for less"):
        num_kv_blocks(2000, 10, 1000)
    with pytest.raises(UsageError, match="does not hold one block"):
        num_kv_blocks(5, 10, 1000)


def test_without_cgroups_it_is_what_the_machine_has(machine):
    assert free_memory(machine.proc) == 100_000


def test_a_limit_counts_less_what_is_used(machine):
    machine.version_2()
    machine.write("memory.max", "1000")
    machine.write("memory.current", "400")
    assert free_memory(machine.proc) == 600
    machine.write("memory.max", "max")
    assert free_memory(machine.proc) == 100_000


@pytest.mark.parametrize(
    ("inner", "outer", "free"), [("max", "1000", 300), ("900", "1000", 300), ("500", "1000", 200)]
)
def test_the_tightest_of_nested_limits_holds(machine, inner, outer, free):
    machine.version_2("/pod/container")
    machine.write("pod/container/memory.max", inner)
    machine.write("pod/container/memory.current", "300")
    machine.write("pod/memory.max", outer)
    machine.write("pod/memory.current", "700")  # others are in it too
    assert free_memory(machine.proc) == free


def test_a_limit_that_slows_down_is_a_limit(machine):
    machine.version_2()
    machine.write("memory.max", "max")
    machine.write("memory.high", "800")
    machine.write("memory.current", "300")
    assert free_memory(machine.proc) == 500


def test_files_read_once_are_free_and_those_in_use_are_not(machine):
    machine.version_2()
    machine.write("memory.max", "1000")
    machine.write("memory.current", "900")
    machine.write("memory.stat", "anon 100\nfile 800\ninactive_file 500\nactive_file 300")
    assert free_memory(machine.proc) == 600


def test_version_1_counts_what_is_below_it_as_well(machine):
    machine.version_1("/a/b")
    machine.write("memory/a/b/memory.limit_in_bytes", UNLIMITED_V1)
    machine.write("memory/a/b/memory.usage_in_bytes", "100")
    machine.write("memory/a/memory.limit_in_bytes", "1000")
    machine.write("memory/a/memory.usage_in_bytes", "900")
    machine.write("memory/a/memory.stat", "inactive_file 0\ntotal_inactive_file 500")
    assert free_memory(machine.proc) == 600


def test_more_used_than_allowed_is_nothing_free(machine):
    machine.version_2()
    machine.write("memory.max", "1000")
    machine.write("memory.current", "1200")
    assert free_memory(machine.proc) == 0


def test_errors_that_say_that_there_is_no_memory():
    assert ran_out_of_memory(MemoryError())
    assert ran_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert ran_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert ran_out_of_memory(RuntimeError("std::bad_alloc"))
    for other in (OSError(28, "No space left"), RuntimeError("shapes"), KeyboardInterrupt()):
        assert not ran_out_of_memory(other)
