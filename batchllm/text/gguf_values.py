"""Values out of a GGUF header, held against the type that they must have."""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from batchllm.errors import ModelError

T = TypeVar("T")
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def typed(metadata: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    """A scalar or text, or None where the header has none; whole numbers will do for `float`.

    Raises:
        ModelError: it is of another type.
    """
    value = metadata.get(key)
    if value is None or type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)  # type: ignore[return-value]
    raise ModelError(f"{key} is {shown(value)}, not {_WORDS[kind]}")


def texts(metadata: Mapping[str, Any], key: str) -> list[str] | None:
    """A list of texts, or None where the header has none.

    Raises:
        ModelError: it is something else.
    """
    value = metadata.get(key)
    if value is None or isinstance(value, list):
        return value
    raise ModelError(f"{key} is {shown(value)}, not a list of texts")


def numbers(metadata: Mapping[str, Any], key: str) -> NDArray[Any] | None:
    """A list of numbers as an array, or None where the header has none.

    Raises:
        ModelError: it is something else.
    """
    value = metadata.get(key)
    if value is None or isinstance(value, np.ndarray):
        return value
    if isinstance(value, list) and not any(isinstance(item, str) for item in value):
        return np.array(value)
    raise ModelError(f"{key} is {shown(value)}, not a list of numbers")


def shown(value: object) -> str:
    """A value for a message: a list by its length."""
    return f"a list of {len(value):,}" if isinstance(value, list | np.ndarray) else repr(value)
