"""What a caller of `LLM.answer` is told, and says, while a window is answered."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.progress import Progress
from batchllm.request import RequestOutput


def _ignore(outputs: list[RequestOutput]) -> None:
    pass


def _go_on() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """By default nobody looks, and nobody stops it.

    Attributes:
        progress: told what is done.
        keep: given each output soon after it is finished (but for the last ones), once.
        should_stop: asked after every step.
        before_step: told, before every step, the numbers of the rows in flight.
    """

    progress: Progress | None = None
    keep: Callable[[list[RequestOutput]], None] = _ignore
    should_stop: Callable[[], bool] = _go_on
    before_step: Callable[[NDArray[np.int64]], None] | None = None
