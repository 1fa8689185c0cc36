"""FlashInfer, where it is installed; it compiles its kernels itself when they are first used."""

from importlib import import_module
from typing import Any

import torch

from batchllm.errors import UsageError

_OLDEST = (0, 6)


def load_flashinfer() -> Any:  # noqa: ANN401  # a package that need not be installed has no types
    """The package `flashinfer`, with its planning made fast enough to be done every step.

    Raises:
        UsageError: it is missing or too old, or there is no GPU for it.
    """
    if not torch.cuda.is_available():
        raise UsageError("FlashInfer needs a CUDA device, and torch can use none here")
    try:
        library = import_module("flashinfer")
    except (ImportError, OSError) as error:
        raise UsageError(
            f"FlashInfer cannot be used here ({error}); pip install 'batchllm[gpu]'"
        ) from error
    version = str(library.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise UsageError(
            f"FlashInfer {version} is installed; {'.'.join(map(str, _OLDEST))} or later is needed: "
            "pip install --upgrade 'batchllm[gpu]'"
        )
    for module in ("flashinfer.prefill", "flashinfer.decode"):
        make_max_fast(import_module(module))
    return library


def make_max_fast(module: object) -> None:
    """Let a module of FlashInfer's find a tensor's maximum in one call.

    `plan` takes Python's own `max` of the lengths, which goes through them one tensor at a time: in
    every step 3 ms for a thousand rows, with chunks twice that (flashinfer pull request 5043). A
    module's global goes before a built-in, and what is no tensor is left to that.
    """
    setattr(module, "max", _largest)  # noqa: B010  # mypy knows no such attribute


def _largest(*values: Any, **options: Any) -> Any:  # noqa: ANN401
    if len(values) == 1 and isinstance(values[0], torch.Tensor):
        return values[0].max()
    return max(*values, **options)
