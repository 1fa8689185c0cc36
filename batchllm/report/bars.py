"""Small bar charts in a terminal."""

from collections.abc import Mapping

_WIDTH = 32
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(share: float, width: int = _WIDTH) -> str:
    """A bar of `share` (0 to 1) of `width` characters, to an eighth of one."""
    eighths = round(max(0.0, min(share, 1.0)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def by_powers(title: str, unit: str, amounts: Mapping[int, int]) -> list[str]:
    """Lines of a chart over powers of two: `amounts[i]` for sizes `[2**i, 2**(i + 1))`."""
    total, most = sum(amounts.values()), max(amounts.values(), default=0)
    if not most:
        return []
    lines = [title]
    for power in range(min(amounts), max(amounts) + 1):
        low, high = 2**power, 2 ** (power + 1) - 1
        size = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        amount = amounts.get(power, 0)
        lines.append(f"  {size:>18} {unit} {bar(amount / most)} {amount / total:>6.1%}")
    return lines
