"""Who was in flight when a process crashed, and what that makes of them."""

import os
import signal

import numpy as np
import pytest

from batchllm.io.in_flight import InFlight, read_suspects
from batchllm.io.layout import OutputLayout


@pytest.fixture
def layout(tmp_path):
    layout = OutputLayout.of(tmp_path / "out")
    layout.work.mkdir(parents=True)
    return layout


def crash(layout, *notes, by=signal.SIGSEGV):
    """A process that notes rows and ends by a signal."""
    child = os.fork()
    if child == 0:
        record = InFlight(layout)
        for rows, alone in notes:
            record.note(np.array(rows, dtype=np.int64), alone=alone)
        os.kill(os.getpid(), by)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -by


def known(layout):
    found = read_suspects(layout)
    assert read_suspects(layout).rows.tolist() == sorted([*found.rows, *found.set_aside])
    return found.rows.tolist(), found.set_aside.tolist()


@pytest.mark.parametrize("by", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_rows_in_flight_at_a_crash_are_suspects(layout, by):
    crash(layout, ([1, 2, 3, 4], False), ([9, 3], False), by=by)
    suspects = read_suspects(layout)
    assert suspects.rows.tolist() == [3, 9] and suspects.has_crashed
    assert suspects.reason in ("Segmentation fault", "Aborted", "Bus error")
    assert known(layout) == ([3, 9], [])


def test_the_one_that_crashes_again_alone_is_set_aside(layout):
    crash(layout, ([3, 9], False))
    assert known(layout) == ([3, 9], [])
    crash(layout, ([3], True), ([9, 10], True))  # 10 is a duplicate of 9
    assert known(layout) == ([3], [9, 10])
    finished = np.zeros(20, dtype=np.bool_)
    finished[[9, 10]] = True
    crash(layout, ([3], True), ([], False), ([5, 6], False))
    suspects = read_suspects(layout).but_for(finished)
    assert (suspects.rows.tolist(), suspects.set_aside.tolist()) == ([3, 5, 6], [])


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_who_is_killed_from_outside_suspects_nobody(layout, by):
    crash(layout, ([3], True), by=by)
    assert not read_suspects(layout).has_crashed


def test_who_ends_well_leaves_nothing(layout):
    record = InFlight(layout)
    record.note(np.array([3]), alone=True)
    record.close()
    assert not read_suspects(layout).has_crashed
    assert list(layout.work.iterdir()) == []


def test_a_crash_of_another_process_is_kept_for_the_next(layout):
    record = InFlight(layout)
    record.note(np.array([1, 2, 3]), alone=False)
    record.note(np.array([2]), alone=True)
    record.keep("Bus error")
    record.close()
    suspects = read_suspects(layout)
    assert (suspects.set_aside.tolist(), suspects.reason) == ([2], "Bus error")


def test_files_that_a_crash_left_half_done_suspect_nobody(layout):
    crash(layout, ([3], True))
    layout.in_flight.write_bytes(b"\xff" * 24)
    assert known(layout) == ([], [])
    layout.suspects.write_text("{")
    assert not read_suspects(layout).has_crashed


def test_more_duplicates_than_there_is_room_for(layout):
    crash(layout, (np.arange(1 << 17), False))
    assert len(read_suspects(layout).rows) == 1 << 16


def test_files_that_cannot_be_deleted_are_left(layout, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(5, "disk")

    record = InFlight(layout)
    record.note(np.array([3]), alone=True)
    monkeypatch.setattr(os, "unlink", fail)
    record.close()
    monkeypatch.undo()
    assert not read_suspects(layout).has_crashed


def test_a_full_disk_costs_the_note_alone(layout, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "full")

    record = InFlight(layout)
    monkeypatch.setattr(os, "pwrite", fail)
    record.note(np.array([3]), alone=True)
    record.close()
