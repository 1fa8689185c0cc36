"""A process of ours and the one that started it: how they speak and notice each other's end.

Messages are pickles over pipes. When a child dies, its parent reads the end of its pipe and asks
how; a child that fails says so as its last message. When the parent dies, however it does, the
kernel closes the other end of a pipe that nothing is ever written to (the lifeline), and a thread
that waits for just that ends the child, whatever it is at.
"""

import os
import pickle
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread

from batchllm.errors import BatchLLMError, WorkerCrashedError, WorkerError, WorkerKilledError

# What a dead process makes of its pipes; the last is what closing here does to who reads meanwhile.
_LOST = (OSError, EOFError, pickle.UnpicklingError, ValueError)
_FATAL = (signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL)
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DYING_SECONDS = 10.0  # from the end of its pipes to its own


@dataclass(frozen=True, slots=True)
class _Failed:
    """The last message of a child that met an error."""

    error: BatchLLMError


class Child:
    """A process that runs a module's `main`, in a process group of its own.

    A terminal's interrupt is for the parent to handle, so it does not reach the child.

    Args:
        module: what to run; its `main` should be `run_child`.
        name: for people, like "replica 1".
        environ: its environment; None is ours.

    Raises:
        WorkerError: it cannot be started.
    """

    def __init__(self, module: str, name: str, environ: Mapping[str, str] | None = None) -> None:
        self.name = name
        theirs, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(theirs,),
                process_group=0,
                env=environ,
            )
        except OSError as error:
            os.close(self._lifeline)
            raise WorkerError(f"{name} cannot be started: {error}") from error
        finally:
            os.close(theirs)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """What becomes readable when it says something, or ends; for `select`."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def send(self, message: object) -> None:
        """Hand it a message; if it is dead, `receive` tells."""
        self.send_pickled(pickle.dumps(message, protocol=5))

    def send_pickled(self, message: bytes) -> None:
        """As `send`, for a message that several get."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(message)
            self._process.stdin.flush()

    def receive(self) -> object:
        """Its next message, when there is one.

        Raises:
            BatchLLMError: it failed, or died.
        """
        assert self._process.stdout is not None
        try:
            message: object = pickle.load(self._process.stdout)
        except _LOST as error:
            raise self._death() from error
        if isinstance(message, _Failed):
            raise message.error
        return message

    def failure(self) -> BatchLLMError | None:
        """What `receive` would raise, if it has failed; for who expects no message."""
        if not select.select([self], [], [], 0)[0]:
            return None
        try:
            self.receive()
        except BatchLLMError as error:
            return error
        return None

    def close(self) -> None:
        """End it, whatever it is at; more than once does nothing."""
        if self._lifeline < 0:
            return
        os.close(self._lifeline)
        self._lifeline = -1
        self._process.kill()
        with suppress(ValueError, OSError):  # what it had not read yet is lost
            self._process.communicate()

    def _death(self) -> WorkerError:
        try:
            code = self._process.wait(_DYING_SECONDS)
        except subprocess.TimeoutExpired:
            return WorkerError(f"{self.name} does not answer any more")
        if code >= 0:
            return WorkerError(f"{self.name} ended with exit code {code}")
        reason = signal.strsignal(-code) or f"signal {-code}"
        if -code in _FATAL:
            return WorkerCrashedError(f"{self.name} crashed ({reason})", reason)
        return WorkerKilledError(f"{self.name} was ended from outside ({reason})")


def environ_with_gpus(environ: Mapping[str, str], first: int, count: int) -> dict[str, str]:
    """An environment whose processes see `count` of the GPUs seen in this one, from `first` on."""
    gpus = [str(gpu) for gpu in range(first, first + count)]
    if _VISIBLE in environ:
        gpus = environ[_VISIBLE].split(",")[first : first + count]
    return {**environ, _VISIBLE: ",".join(gpus)}


class Parent:
    """The process that started this one, as this one sees it."""

    def __init__(self) -> None:
        self._source = sys.stdin.buffer
        self._sink = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # nothing that prints gets among the messages
        sys.stdout = sys.stderr

    def receive(self) -> object:
        """Its next message; this process ends if there will be none."""
        try:
            message: object = pickle.load(self._source)
        except _LOST:
            os._exit(0)
        return message

    def send(self, message: object) -> None:
        """Hand it a message; this process ends if nobody reads it."""
        try:
            pickle.dump(message, self._sink, protocol=5)
            self._sink.flush()
        except BrokenPipeError:
            os._exit(0)


def run_child(body: Callable[[Parent], None]) -> None:
    """The `main` of a child: runs `body` until that returns or fails, or the parent is gone.

    Our own errors reach the parent as they are; others are bugs and show their trace here.
    """
    parent = Parent()
    Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    try:
        body(parent)
    except BatchLLMError as error:
        parent.send(_Failed(error))
    except Exception as error:
        traceback.print_exc()
        parent.send(_Failed(WorkerError(f"a worker failed: {type(error).__name__}: {error}")))
    # Not through Python's own end, which waits for threads that wait for each other.
    os._exit(0)


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(0)
