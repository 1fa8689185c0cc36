"""How long answers will be, learned from the rows finished so far."""

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.plan import PrefixPlan

Ints = NDArray[np.int64]


class LengthEstimator:
    """Expects of a row what recent rows did that got as far as it has.

    Lengths are kept as shares of the rows' `max_tokens`. Expected is the mean of those recent
    shares that exceed what the row has already, plus a quarter of their deviation: wrong by a
    little too long costs idle blocks, too short costs a preemption (the margin is tokasaurus's).
    A row that has outlived all recent ones is expected to go on for as long again, and until
    enough rows have finished, `max_tokens` is believed.
    """

    _WINDOW = 2048
    _ENOUGH = 16
    _MARGIN = 0.25

    def __init__(self) -> None:
        self._recent: NDArray[np.float64] = np.zeros(self._WINDOW)
        self._count = 0
        self._sorted: NDArray[np.float64] | None = None
        self._sums: NDArray[np.float64] = np.zeros(0)
        self._squares: NDArray[np.float64] = np.zeros(0)

    def observe(self, num_outputs: Ints, max_tokens: Ints) -> None:
        """Record finished rows, [n]."""
        shares = (num_outputs / max_tokens)[-self._WINDOW :]
        places = (self._count + np.arange(len(shares))) % self._WINDOW
        self._recent[places] = shares
        self._count += len(shares)
        self._sorted = None

    def remaining(self, num_outputs: Ints, max_tokens: Ints, known: NDArray[np.bool_]) -> Ints:
        """Tokens that rows are expected to sample still, at least 1 each, [n].

        Where `known`, a row goes on to its `max_tokens`.
        """
        left: Ints = np.maximum(max_tokens - num_outputs, 1)
        if self._count < self._ENOUGH or known.all():
            return left
        if self._sorted is None:
            self._sort()
        assert self._sorted is not None
        place = np.searchsorted(self._sorted, num_outputs / max_tokens, side="right")
        longer = np.maximum(len(self._sorted) - place, 1)
        mean = self._sums[place] / longer
        deviation = np.sqrt(np.maximum(self._squares[place] / longer - mean * mean, 0.0))
        expected = np.rint((mean + self._MARGIN * deviation) * max_tokens).astype(np.int64)
        expected = np.where(place == len(self._sorted), 2 * num_outputs, expected)
        remaining: Ints = np.where(known, left, np.clip(expected - num_outputs, 1, left))
        return remaining

    def expected(self, plan: PrefixPlan) -> Ints:
        """Expected lengths of a plan's answers, [num_leaves]."""
        leaf_row = plan.tree.leaf_row
        known = np.array([p.ignore_eos for p in plan.params], dtype=np.bool_)
        return self.remaining(
            np.zeros_like(leaf_row), plan.max_tokens[leaf_row], known[plan.params_index[leaf_row]]
        )

    def _sort(self) -> None:
        """Sort the recent shares, with the sums of each and all longer ones."""
        shares = np.sort(self._recent[: min(self._count, self._WINDOW)])
        self._sorted = shares
        self._sums = np.append(np.cumsum(shares[::-1])[::-1], 0.0)
        self._squares = np.append(np.cumsum((shares * shares)[::-1])[::-1], 0.0)
