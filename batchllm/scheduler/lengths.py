"""How long answers will be, learned from the rows finished so far."""

import math
from collections import deque


class LengthEstimator:
    """Expects the mean share of `max_tokens` that recent rows used, plus a quarter deviation.

    The margin is tokasaurus's: wrong by a little too long costs idle blocks, too short costs a
    preemption. Until enough rows have finished, `max_tokens` is believed.
    """

    _WINDOW = 2048
    _ENOUGH = 16
    _MARGIN = 0.25

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=self._WINDOW)
        self._total = 0.0
        self._squares = 0.0

    def observe(self, num_output_tokens: int, max_tokens: int) -> None:
        """Record a finished row."""
        if len(self._recent) == self._WINDOW:
            oldest = self._recent[0]
            self._total -= oldest
            self._squares -= oldest * oldest
        ratio = num_output_tokens / max_tokens
        self._recent.append(ratio)
        self._total += ratio
        self._squares += ratio * ratio

    def remaining(self, num_output_tokens: int, max_tokens: int, *, ignore_eos: bool) -> int:
        """Tokens a row is expected to sample still, at least 1."""
        left = max_tokens - num_output_tokens
        count = len(self._recent)
        if ignore_eos or count < self._ENOUGH:
            return max(left, 1)
        mean = self._total / count
        deviation = math.sqrt(max(self._squares / count - mean * mean, 0.0))
        expected = round((mean + self._MARGIN * deviation) * max_tokens) - num_output_tokens
        return max(min(expected, left), 1)
