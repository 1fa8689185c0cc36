"""Seconds of a step's parts, by name."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import ParamSpec, TypeVar

PRODUCTS, ATTENTION, ROW_WISE = "matrix products", "attention", "norms and gates"
SAMPLING, SCHEDULER, OTHER = "sampling", "scheduler", "other"
PARTS = (PRODUCTS, ATTENTION, ROW_WISE, SAMPLING, OTHER, SCHEDULER)

P = ParamSpec("P")
R = TypeVar("R")


class Clock:
    """Seconds by part. Parts are calls that do not overlap.

    `settle` waits until what was begun is done, where a device goes on by itself: a part's time is
    the device's then, and the parts' sum more than an undisturbed run would take.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.settle: Callable[[], None] = lambda: None

    def timed(self, part: str, call: Callable[P, R]) -> Callable[P, R]:
        """The same call, its time added to a part."""

        def timed_call(*args: P.args, **kwargs: P.kwargs) -> R:
            self.settle()
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.settle()
                self.seconds[part] += time.perf_counter() - started

        return timed_call
