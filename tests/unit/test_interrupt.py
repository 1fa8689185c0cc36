"""Signals: the first one waits for whoever says so, ignored ones stay ignored."""

import os
import signal

import pytest

from batchllm.interrupt import StopSignals

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_unless_it_is_waited_for(number, capfd):
    signal.signal(number, signal.SIG_DFL)
    with StopSignals() as stop:
        with stop.waited_for():
            os.kill(os.getpid(), number)
            assert stop.requested
        assert "stopping after this step" in capfd.readouterr().err
    assert signal.getsignal(number) == signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        os.kill(os.getpid(), number)
    assert stop.requested


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_ends_the_process(number):
    child = os.fork()
    if child == 0:
        signal.signal(number, signal.SIG_DFL)
        with StopSignals() as stop, stop.waited_for():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_ignored_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
    assert not stop.requested
