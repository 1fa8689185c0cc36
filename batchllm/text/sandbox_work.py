"""How much work a template's values are, counted in units of an item or 16 characters."""

from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import SecurityError

MAX_WORK = 2_000_000
_ATOMS = {bool, float, type(None)}
DICT_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_CONTAINERS = (list, tuple, set, frozenset, *DICT_VIEWS)


@dataclass(slots=True)
class Budget:
    """What one render may still do."""

    left: int

    def spend(self, units: int) -> None:
        """Pay for some work.

        Raises:
            SecurityError: more is spent than is left.
        """
        self.left -= units
        if self.left < 0:
            raise SecurityError(
                f"it takes too much work for one row: more than {MAX_WORK:,} steps, "
                f"or {16 * MAX_WORK:,} characters"
            )


@dataclass(frozen=True, slots=True)
class Extent:
    """A value with all that is in it: its work, and how deeply it is nested."""

    units: int
    depth: int


def shallow(value: object) -> int:
    """The work of copying a value, what is in it not looked at."""
    if isinstance(value, str | bytes):
        return 1 + (len(value) >> 4)
    if isinstance(value, list | tuple | dict | range):
        return 1 + len(value)
    if isinstance(value, int):
        return 1 + (value.bit_length() >> 6)
    return 1


def deep(value: Any, budget: Budget) -> Extent:  # noqa: ANN401
    """The work of printing or comparing a value, counted as often as it is reached.

    A few lists that hold each other twice are 2^n items, so it looks no further than `budget`.

    Raises:
        SecurityError: there is more than is left.
    """
    units, depth = 0, 0
    level = [value]
    while level:
        below: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is str:
                units += 1 + (len(item) >> 4)
            elif kind is int:
                units += 1 + (item.bit_length() >> 6)
            elif kind in _ATOMS:
                units += 1
            elif isinstance(item, dict):
                units += 1
                below += item
                below += item.values()
            elif isinstance(item, _CONTAINERS):
                units += 1
                below += iter(item)
            else:
                units += shallow(item)
            if units + len(below) > budget.left:
                budget.spend(budget.left + 1)
        level = below
        depth += 1
    return Extent(units, depth)


def replacing(text: Any, old: object, new: object) -> int:  # noqa: ANN401
    """The work of putting `new` for each `old` of a text, which can make it far longer."""
    if not isinstance(old, type(text)) or not isinstance(new, str | bytes):
        return 1  # an error, soon
    return 1 + (int(text.count(old)) * len(new) >> 4)
