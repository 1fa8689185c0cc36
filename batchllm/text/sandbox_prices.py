"""What operators, filters and methods cost a template, by what they are given; some are refused."""

import re
from typing import Any

from jinja2.exceptions import SecurityError

from batchllm.text.sandbox_work import Budget, deep, replacing, shallow

_MAX_BITS = 1 << 14
_MAX_WIDTH = 100_000
_STAR_OR_LONG = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{6})")
_NESTED_OR_LONG = re.compile(r":[^{}]*(?:\{|\d{6})")
_WIDTH = re.compile(r"\d{3,5}")

# These filters cost next to nothing, whatever they are given.
FREE = {"abs", "attr", "count", "d", "default", "first", "length", "safe", "float"}
# These read a text once and give one about as long, which is paid for when it is there.
LINEAR = {"trim", "upper", "lower", "capitalize", "title", "string", "tojson", "escape", "e"}
# What these give can hold one value many times.
REPEATING = {"map", "batch", "slice", "groupby"}
_LAZY = {"map", "select", "reject", "selectattr", "rejectattr"}
_FLAT = {*_LAZY, "list", "items", "last", "random", "reverse", "batch", "slice"}
# What these write can be as long as value and arguments multiplied.
_MULTIPLYING = {"indent", "wordwrap", "urlize", "xmlattr", "join"}
_LARGEST_NUMBER = {
    **{"center": _MAX_WIDTH, "indent": 1000, "wordwrap": _MAX_WIDTH, "round": 400, "tojson": 100},
    **{"batch": 10_000, "slice": 10_000},
}


def check_number(value: object) -> None:
    """Refuse a whole number that is too long to reckon with.

    Raises:
        SecurityError: it has more than 2^14 bits.
    """
    if isinstance(value, int):
        _check_bits(value.bit_length())


def binary(operator: str, left: Any, right: Any, budget: Budget) -> int:  # noqa: ANN401
    """The price of `left operator right`, other than a sum."""
    if isinstance(left, int) and isinstance(right, int):
        if operator == "*":
            _check_bits(left.bit_length() + right.bit_length())
        elif operator == "**" and right > 0 and abs(left) > 1:
            _check_bits(left.bit_length() * right if right <= _MAX_BITS else right)
        return 1
    if operator == "*":
        for number, other in ((left, right), (right, left)):
            if isinstance(number, int) and number > 0:
                return number * deep(other, budget).units
    if operator == "%" and isinstance(left, str | bytes):
        return _percent(str(left), right, budget)
    return 1


def filtering(name: str, value: Any, arguments: list[Any], budget: Budget) -> int:  # noqa: ANN401
    """The price of `value | name(arguments)`."""
    largest = _LARGEST_NUMBER.get(name)
    numbers = [abs(argument) for argument in arguments if isinstance(argument, int)]
    if largest is not None and max(numbers, default=0) > largest:
        raise SecurityError(f"the filter {name} takes numbers up to {largest:,}")
    given = deep(arguments, budget).units if arguments else 1
    if name in _FLAT:
        length = len(value) if hasattr(value, "__len__") else 1
        return length * given if name in _LAZY else length + given
    extent = deep(value, budget)
    price = extent.units + given
    if name in _MULTIPLYING:
        price = extent.units * (given + sum(numbers))
    elif name == "replace" and len(arguments) > 1:
        price += replacing(str(value), arguments[0], arguments[1])
    elif name == "format":
        price += _percent(str(value), tuple(arguments), budget)
    elif name == "striptags":  # copies all of it for each tag
        price += extent.units * str(value).count("<") >> 8
    elif name == "sum" and arguments:  # of lists, copies what it has for each
        price += extent.units**2 >> 4
    elif name == "tojson" and arguments:
        price += extent.units * extent.depth * (given + sum(numbers)) >> 4
    return price


def method(
    name: str,
    owner: Any,  # noqa: ANN401
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    budget: Budget,
) -> int:
    """The price of `owner.name(*args, **kwargs)`, but for that of reading the arguments."""
    values = [*args, *kwargs.values()]
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"):
        _check_widths(values)
    if name in ("fromkeys", "maketrans", "translate"):
        raise SecurityError(f"the method {name} is not for templates")
    if not isinstance(owner, str | bytes):
        return deep(owner, budget).units if name in ("index", "count") else shallow(owner)
    price = shallow(owner)
    if name == "expandtabs":
        price += str(owner).count("\t") * max((v for v in values if isinstance(v, int)), default=8)
    elif name == "replace" and len(args) > 1:
        price += replacing(owner, args[0], args[1])
    elif name == "join":
        price *= deep(values, budget).units
    elif name in ("format", "format_map"):
        if _NESTED_OR_LONG.search(str(owner)):
            raise SecurityError("a format's width must be written in it, and below 100,000")
        price = (price + _widths(str(owner))) * deep(values, budget).units
    elif name in ("split", "rsplit", "splitlines"):
        price = 1 + (len(owner) >> 2)
    return price


def _percent(text: str, values: object, budget: Budget) -> int:
    if _STAR_OR_LONG.search(text):
        raise SecurityError("a format's width must be written in it, and below 100,000")
    return deep(values, budget).units * (1 + text.count("%")) + _widths(text)


def _widths(text: str) -> int:
    return sum(map(int, _WIDTH.findall(text))) >> 4


def _check_widths(values: list[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > _MAX_WIDTH for value in values):
        raise SecurityError(f"a text's width can be {_MAX_WIDTH:,} at most")


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise SecurityError(f"a number has more than {_MAX_BITS:,} bits")
