"""For tests that start processes: a hang fails, and nobody is left behind."""

import faulthandler
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

_SECONDS = 150


@pytest.fixture
def hard_limit():
    """A test that takes minutes fails; one that cannot even be interrupted ends pytest."""

    def too_long(number, frame):
        raise TimeoutError(f"{_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(_SECONDS)
    faulthandler.dump_traceback_later(2 * _SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def gone(processes, seconds=20):
    """Whether these, and those that they have started, end by themselves within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(is_alive(process) for process in processes):
            return True
        time.sleep(0.02)
    return False


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def tests_on_path(monkeypatch):
    """Processes that a test starts can import what lies beside the tests."""
    here = Path(__file__).parent
    for folder in (here.parent, here):
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
