"""What a caller of `LLM.answer` is told, and says, while a window is answered."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.plan import PrefixPlan
from batchllm.request import RequestOutput
from batchllm.scheduler.batch import Batch


class Onlooker(Protocol):
    """Told how a window gets on; see `Progress`."""

    def start_window(self, plan: PrefixPlan) -> None: ...

    def on_step(self, batch: Batch) -> None: ...

    def add_tokens(self, count: int) -> None:
        """Count tokens of steps that others take."""
        ...

    def finish_rows(self, count: int) -> None: ...

    def note(self, text: str) -> None: ...


def _ignore(outputs: list[RequestOutput]) -> None:
    pass


def _go_on() -> bool:
    return False


class Pace:
    """Answers are handed over after each step, unless that takes more than a fiftieth of the time.

    `longest` is the longest pause in seconds.
    """

    _PAUSE = 50  # times what the last hand-over took

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._at, self._pause = time.monotonic(), 0.0

    @property
    def is_due(self) -> bool:
        """Whether it is time for a hand-over."""
        return time.monotonic() - self._at > self._pause

    @contextmanager
    def hand_over(self) -> Iterator[None]:
        """Within, answers are handed over."""
        begun = time.monotonic()
        yield
        self._at = time.monotonic()
        self._pause = min(self._longest, self._PAUSE * (self._at - begun))


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """By default nobody looks, and nobody stops it.

    Attributes:
        progress: told what is done.
        keep: given each output soon after it is finished (but for the last ones), once.
        should_stop: asked after every step.
        before_step: told, before every step, the numbers of the rows in flight.
    """

    progress: Onlooker | None = None
    keep: Callable[[list[RequestOutput]], None] = _ignore
    should_stop: Callable[[], bool] = _go_on
    before_step: Callable[[NDArray[np.int64]], None] | None = None
