"""How many threads compute, by what a process may use."""

import os

import psutil
import pytest
from cgroups import FakeMachine

from batchllm.cpus import Cpus, available_cpus
from batchllm.runner.threads import choose_threads

FOUR_CORES = Cpus(8, 4, None)


@pytest.fixture
def machine(tmp_path):
    return FakeMachine(tmp_path)


def look(machine, allowed):
    return available_cpus(machine.proc, machine.sysfs, allowed)


def choose(cpus, asked=None, **environ):
    return choose_threads(asked, cpus, openmp_threads=6, environ=environ)


@pytest.mark.parametrize(
    ("siblings", "allowed", "cores"),
    [
        (("0", "1"), {0, 1}, 2),
        (("0-1", "0-1", "2-3", "2-3"), {0, 1, 2, 3}, 2),
        (("0,2", "1,3", "0,2", "1,3"), {0, 1, 2, 3}, 2),
        (("0,2", "1,3", "0,2", "1,3"), {0, 2}, 1),  # both threads of one core
        (("0,2", "1,3", "0,2", "1,3"), {0, 1}, 2),
        ((), {0, 1, 5}, 3),  # nothing is known of them
        (("0-1",), {0, 1}, 2),
    ],
)
def test_cores_are_counted_among_the_allowed_cpus(machine, siblings, allowed, cores):
    machine.processors(*siblings)
    assert look(machine, allowed) == Cpus(len(allowed), cores, None)


@pytest.mark.parametrize(
    ("text", "quota"),
    [("max 100000", None), ("250000 100000", 2.5), ("5000 10000", 0.5), ("", None), ("?", None)],
)
def test_a_quota_of_version_2(machine, text, quota):
    machine.version_2()
    machine.write("cpu.max", text)
    assert look(machine, {0}).quota == quota


@pytest.mark.parametrize(("text", "quota"), [("-1", None), ("150000", 1.5), ("0", None)])
def test_a_quota_of_version_1(machine, text, quota):
    machine.version_1("/docker/4f3a", root="/docker/4f3a")
    machine.write("cpu,cpuacct/cpu.cfs_quota_us", text)
    machine.write("cpu,cpuacct/cpu.cfs_period_us", "100000")
    assert look(machine, {0}).quota == quota


def test_the_tightest_of_nested_quotas_holds(machine):
    machine.version_2("/slice/service/worker")
    machine.write("slice/service/cpu.max", "300000 100000")  # and none in worker: not delegated
    machine.write("slice/cpu.max", "200000 100000")
    assert look(machine, set(range(8))).quota == 2
    machine.write("slice/cpu.max", "max 100000")
    assert look(machine, set(range(8))).quota == 3


def test_by_default_this_process_is_asked():
    cpus = available_cpus()
    assert 1 <= cpus.num_cores <= cpus.num_cpus <= (os.cpu_count() or 1)


def test_where_there_is_no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 6)
    assert available_cpus() == Cpus(12, 6, None)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    assert available_cpus() == Cpus(12, 12, None)


@pytest.mark.parametrize(
    ("cpus", "text"),
    [
        (Cpus(1, 1, None), "1 thread (1 core)"),
        (Cpus(2, 2, None), "2 threads (2 cores)"),
        (FOUR_CORES, "4 threads (4 cores, 8 CPUs)"),
        (Cpus(8, 4, 4.0), "4 threads (4 cores, 8 CPUs)"),
        (Cpus(8, 4, 3.9), "3 threads (CPU quota of 3.9)"),
        (Cpus(64, 32, 2.0), "2 threads (CPU quota of 2)"),
        (Cpus(64, 32, 0.5), "1 thread (CPU quota of 0.5)"),
    ],
)
def test_one_thread_a_core_that_the_quota_pays_for(cpus, text):
    chosen = choose(cpus)
    assert (str(chosen), chosen.warning) == (text, None)


def test_an_option_goes_before_the_environment_and_that_before_the_machine():
    assert str(choose(FOUR_CORES, 3, OMP_NUM_THREADS="2")) == "3 threads (as asked)"
    assert str(choose(FOUR_CORES, OMP_NUM_THREADS="2")) == "2 threads (OMP_NUM_THREADS)"
    assert choose(FOUR_CORES, OMP_NUM_THREADS="2,4").count == 2
    for nonsense in ("", "0", "-1", "all"):
        assert choose(FOUR_CORES, OMP_NUM_THREADS=nonsense).count == 4


def test_more_threads_than_cpus_are_warned_of():
    assert choose(FOUR_CORES, 8).warning is None  # hardware threads: no gain, but no waiting
    words = "9 threads, but this process may use 8 CPUs at once; --threads 4 fits"
    assert choose(FOUR_CORES, 9).warning == words
    assert choose(FOUR_CORES, OMP_NUM_THREADS="9").warning == words
    assert choose(Cpus(8, 4, 1.5), 2).warning == (
        "2 threads, but this process may use 1 CPU at once; --threads 1 fits"
    )


def test_where_openmp_ties_threads_to_cpus_it_says_how_many():
    """The main thread is then tied to one CPU, and so is everything that it starts."""
    tied = Cpus(1, 1, None)
    assert str(choose(tied, OMP_PROC_BIND="true")) == "6 threads (6 cores)"
    assert choose(Cpus(1, 1, 3.5), OMP_PROC_BIND="true").count == 3
    assert choose(tied, GOMP_CPU_AFFINITY="0-5").warning is None
    assert choose(tied, 4, OMP_PLACES="cores").warning is None
    assert choose(tied, OMP_PROC_BIND="false").count == 1
