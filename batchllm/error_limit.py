"""How many rows may fail: a number, or a share of them."""

from dataclasses import dataclass

from batchllm.errors import UsageError


@dataclass(frozen=True, slots=True)
class ErrorLimit:
    """At most `count` rows, or `percent` of them; without both, any number."""

    count: int | None = None
    percent: float | None = None

    @classmethod
    def parse(cls, text: str | None) -> "ErrorLimit":
        """`100` or `0.5%`; None for any number.

        Raises:
            UsageError: neither, or below 0, or above 100 %.
        """
        if text is None:
            return NO_LIMIT
        number = text.strip().removesuffix("%")
        try:
            if number != text.strip():
                limit = cls(percent=float(number))
                if 0 <= float(number) <= 100:
                    return limit
            elif (count := int(number)) >= 0:
                return cls(count=count)
        except ValueError:
            pass
        raise UsageError(f"max_errors is {text!r}; it must be a number of rows, like 100, or 0.5%")

    def of(self, num_rows: int) -> int | None:
        """The most rows that may fail of so many; None for any number."""
        if self.percent is not None:
            return int(num_rows * self.percent / 100)
        return self.count


NO_LIMIT = ErrorLimit()
