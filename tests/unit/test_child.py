"""Processes of ours: what they say arrives, how they end is told, and they outlive nobody."""

import os
import signal
import subprocess
import sys
from contextlib import closing

import numpy as np
import psutil
import pytest
from process_checks import gone, hard_limit, tests_on_path

from batchllm.child import Child, environ_with_gpus
from batchllm.errors import UsageError, WorkerCrashedError, WorkerError, WorkerKilledError

pytestmark = pytest.mark.usefixtures(hard_limit.__name__, tests_on_path.__name__)

_PARENT = """
import sys
from batchllm.child import Child
child = Child("child_bodies", "sleeper")
child.send("sleep")
assert child.receive() == "good night"
print(child.pid, flush=True)
child.receive()
"""


def started():
    """Closed at the end; not a fixture, since those have another stderr than tests."""
    return closing(Child("child_bodies", "helper 7"))


def test_messages_arrive_as_they_are_whatever_is_printed(capfd):
    with started() as child:
        for message in ({"a": (1, None)}, np.arange(1 << 20)):
            child.send(("echo", message))
            assert np.array_equal(child.receive(), message)
        assert child.failure() is None
    assert capfd.readouterr() == ("", "this is no message\n" * 2)


@pytest.mark.parametrize(
    ("message", "error", "text"),
    [
        ("refuse", UsageError, "^heads cannot be divided$"),
        ("bug", WorkerError, "^a worker failed: KeyError: 'a bug'$"),
        ("exit", WorkerError, "^helper 7 ended with exit code 3$"),
        (
            ("die", signal.SIGKILL),
            WorkerKilledError,
            r"^helper 7 was ended from outside \(Killed\)",
        ),
        (("die", signal.SIGSEGV), WorkerCrashedError, r"^helper 7 crashed \(Segmentation fault\)$"),
        (("die", signal.SIGABRT), WorkerCrashedError, r"^helper 7 crashed \(Aborted\)$"),
    ],
)
def test_how_it_ended_is_told(capfd, message, error, text):
    with started() as child:
        child.send(message)
        with pytest.raises(error, match=text) as told:
            child.receive()
        assert type(told.value) is error
        if error is WorkerCrashedError:
            assert told.value.reason in str(told.value) and told.value.rows == ()
        child.send("nobody reads this")
        with pytest.raises(WorkerError):
            child.receive()
        assert isinstance(child.failure(), WorkerError)
    assert ("Traceback" in capfd.readouterr().err) == (message == "bug")


def test_what_was_said_before_the_end_is_read_first():
    with started() as child:
        child.send(("echo", 1))
        child.send(("die", signal.SIGKILL))
        assert child.receive() == 1
        with pytest.raises(WorkerKilledError):
            child.receive()


def test_what_cannot_be_started_is_told(monkeypatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    before = psutil.Process().num_fds()
    with pytest.raises(WorkerError, match="helper cannot be started"):
        Child("child_bodies", "helper")
    assert psutil.Process().num_fds() == before


def test_closing_ends_it_whatever_it_is_at():
    before = psutil.Process().num_fds()
    child = Child("child_bodies", "sleeper")
    process = psutil.Process(child.pid)
    child.send("sleep")
    assert child.receive() == "good night"
    child.close()
    child.close()
    assert not process.is_running()
    assert psutil.Process().num_fds() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_its_parent_does(number):
    command = [sys.executable, "-c", _PARENT]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        assert os.getpgid(child.pid) == child.pid  # a terminal's Ctrl-C does not reach it
        parent.send_signal(number)
    assert gone([child])


@pytest.mark.parametrize(
    ("seen", "first", "count", "expected"),
    [(None, 0, 1, "0"), (None, 4, 2, "4,5"), ("3,GPU-7,1,0", 1, 2, "GPU-7,1"), ("5", 1, 1, "")],
)
def test_which_gpus_a_process_sees(seen, first, count, expected):
    environ = {"PATH": "/bin"} | ({} if seen is None else {"CUDA_VISIBLE_DEVICES": seen})
    found = environ_with_gpus(environ, first, count)
    assert found == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": expected}
