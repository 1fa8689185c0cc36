"""How a command ends: our errors as one line on stderr and an exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from batchllm.errors import BatchLLMError, UsageError
from batchllm.interrupt import INTERRUPTED

FAILED, USAGE, TOO_MANY_ERRORS = 1, 2, 3


@contextmanager
def errors_as_exit_codes(interrupted: str) -> Iterator[None]:
    """Turn our errors into one line on stderr and an exit code; others are bugs and show."""
    try:
        yield
    except UsageError as error:
        _fail(str(error), USAGE)
    except BatchLLMError as error:
        _fail(str(error), FAILED)
    except KeyboardInterrupt:
        _fail(interrupted, INTERRUPTED)


def _fail(message: str, code: int) -> None:
    print(f"batchllm: {message}", file=sys.stderr)
    raise typer.Exit(code)
