"""Writes that survive a crash: a file appears under its name whole and on disk, or not at all."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from batchllm.errors import OutputError

# File systems without flock; running unguarded there beats not running at all.
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def one_line_reason(error: BaseException) -> str:
    """Why an operation failed, as one short line without Arrow's or Python's wrapping."""
    number = getattr(error, "errno", None)
    if number:
        return os.strerror(number)
    lines = str(error).strip().splitlines()
    reason = lines[0].rstrip(". ") if lines else type(error).__name__
    return reason if len(reason) <= 200 else reason[:197] + "..."


def fsync_dir(folder: Path) -> None:
    """Make renames and new names inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_write(target: Path, temporary: Path) -> Iterator[IO[bytes]]:
    """Yield a file that becomes `target` when the block ends well, and vanishes when it fails.

    `temporary` must be on the same file system. Only errors clean up after themselves; what an
    interrupt or a kill leaves behind is removed when the output is next opened.

    Raises:
        OSError: from any step; `target` is then what it was before, except that it may already be
            the new file when only the directory's fsync failed.
    """
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except Exception:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_dir(target.parent)


class AppendFile:
    """A file that is appended to, a record at a time, and made where there is none.

    Raises:
        OSError: from any method; a record that could not be written whole is taken back.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Go on after the first `num_bytes`, which are what is valid of it."""
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._length = num_bytes
        os.ftruncate(self._handle, num_bytes)

    def append(self, record: bytes, *, sync: bool) -> None:
        """Write a record behind the others; with `sync` all of them are on disk afterwards."""
        at, end = self._length, self._length + len(record)
        try:
            # At an offset of our own, so that half a record of a failed try is written over: with
            # anything behind it, it would make the whole file unreadable.
            while at < end:
                at += os.pwrite(self._handle, record[at - end :], at)
            if sync:
                os.fsync(self._handle)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._handle, self._length)
            raise
        self._length = end

    def clear(self) -> None:
        """Make it empty."""
        os.ftruncate(self._handle, 0)
        self._length = 0

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


class OutputLock:
    """An advisory lock on a file, held until `release` or until the process dies.

    The kernel drops an flock with its process, so a crash never leaves an output locked.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self._path = path
        self._handle: int | None = handle

    @classmethod
    def acquire(cls, path: Path, output: Path) -> "OutputLock":
        """Take the lock at `path` at once, making directories; `output` is what it guards.

        Raises:
            OutputError: another process holds it.
            OSError: the lock file or its directory cannot be made.
        """
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)  # its last holder may have deleted it
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise cls.busy(output) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(handle)
                    raise
            # A holder that finished in between has deleted the file we locked: lock the new one.
            with suppress(FileNotFoundError):
                if os.fstat(handle).st_ino == path.stat().st_ino:
                    return cls(path, handle)
            os.close(handle)

    @staticmethod
    def is_held(path: Path) -> bool:
        """Whether a process holds the lock at `path`; makes nothing."""
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(handle)
        return False

    @staticmethod
    def busy(output: Path) -> OutputError:
        """The error of whoever comes second."""
        return OutputError(f"{output}: another process is writing it; wait for that one to end")

    def release(self, *, delete: bool = False) -> None:
        """Give the lock back, and delete its file first where nothing will need it again."""
        if self._handle is None:
            return
        if delete:
            with suppress(OSError):
                self._path.unlink()
        os.close(self._handle)
        self._handle = None
