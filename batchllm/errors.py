"""What batchllm raises. Everything a user can cause derives from BatchLLMError."""

from collections.abc import Sequence

_MESSAGE_CHARS = 1000


class BatchLLMError(Exception):
    """A failure with a message meant for the user; the CLI prints it as one line, exit code 1.

    Names and values out of files are part of many messages, so line ends, control characters and
    lone surrogates are shown as escapes, and what is very long is cut in the middle.
    """

    def __str__(self) -> str:
        return one_line(super().__str__(), _MESSAGE_CHARS)


class UsageError(BatchLLMError, ValueError):
    """The user asked for something impossible (a wrong column, option or model); exit code 2."""


class InputError(BatchLLMError):
    """The input cannot be read: missing, empty, truncated, or not Parquet."""


class OutputError(BatchLLMError):
    """The output cannot be written, or belongs to a different job."""


class ModelError(BatchLLMError):
    """A model cannot be found or loaded."""


class OutOfMemoryError(BatchLLMError):
    """There is no memory for a step, or for as small a one as makes sense."""


class WorkerError(BatchLLMError):
    """A process of ours failed; what it was to do is lost, what it had handed over is not."""


class WorkerKilledError(WorkerError):
    """A process of ours was ended from outside."""


class WorkerCrashedError(WorkerError):
    """A process of ours ended by a fatal signal, as a bug makes it.

    Attributes:
        reason: the signal, for people.
        rows: which were in flight there, as far as is known: it may be one of them that did it.
    """

    def __init__(self, message: str, reason: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message, reason, rows)
        self.reason = reason
        self.rows = rows

    def __str__(self) -> str:
        return one_line(self.args[0], _MESSAGE_CHARS)


class PeerLostError(WorkerError):
    """Another process of a group is gone, and that one can say why."""


class MissingExtraError(BatchLLMError, ImportError):
    """An optional part is not installed; the message says which extra brings it."""


def one_line(text: str, most: int) -> str:
    """A text as a line of at most `most` characters that a terminal can be given."""
    text = _cut(text, most)
    if text.isprintable():
        return text
    return _cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in text), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-most // 4 :]}"
