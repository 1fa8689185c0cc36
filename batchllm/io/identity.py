"""Is this the same job? Two nested dicts compared, each difference named by its dotted path."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

_MAX_SHOWN = 5
_MAX_VALUE_LENGTH = 40
_MISSING = object()


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` as JSON gives it back, so that it compares with a stored one.

    Tuples become lists, and numbers that are not finite, which JSON lacks, become null.

    Raises:
        TypeError: a value is not plain data.
    """
    copy: dict[str, Any] = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return copy


def describe_differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """What differs, for a message: `sampling.max_tokens is 64, was 128; model.sha256 differs`.

    Both values are given where they are short. Empty when nothing differs.
    """
    found = list(_differences(stored, current, ""))
    shown = "; ".join(found[:_MAX_SHOWN])
    return shown if len(found) <= _MAX_SHOWN else f"{shown}; and {len(found) - _MAX_SHOWN} more"


def _differences(stored: Any, current: Any, path: str) -> Iterator[str]:  # noqa: ANN401
    if isinstance(stored, Mapping) and isinstance(current, Mapping):
        for key in dict.fromkeys((*current, *stored)):
            yield from _differences(
                stored.get(key, _MISSING),
                current.get(key, _MISSING),
                f"{path}.{key}" if path else str(key),
            )
    elif stored != current:
        now, before = _show(current), _show(stored)
        if max(len(now), len(before)) > _MAX_VALUE_LENGTH:
            yield f"{path} differs"
        else:
            yield f"{path} is {now}, was {before}"


def _show(value: Any) -> str:  # noqa: ANN401
    return "not set" if value is _MISSING else json.dumps(value, ensure_ascii=False)
