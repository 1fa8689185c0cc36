"""How long answers will be, learned from the rows finished so far."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.plan import PrefixPlan

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_NONE: Floats = np.zeros(0)


@dataclass(frozen=True, slots=True)
class Expectation:
    """Tokens that rows will sample still, at least 1 each, and the deviation of that; [n]."""

    tokens: Ints
    deviation: NDArray[np.float64]


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

    @property
    def knows(self) -> bool:
        """Whether enough rows have finished to expect anything but `max_tokens`."""
        return self._count >= self._ENOUGH

    def observe(self, num_outputs: Ints, max_tokens: Ints) -> None:
        """Record finished rows, [n]."""
        shares = (num_outputs / max_tokens)[-self._WINDOW :]
        places = (self._count + np.arange(len(shares))) % self._WINDOW
        self._recent[places] = shares
        self._count += len(shares)
        self._sorted = None

    def remaining(
        self, num_outputs: Ints, max_tokens: Ints, known: NDArray[np.bool_]
    ) -> Expectation:
        """What rows are expected to sample still, [n].

        Where `known`, a row goes on to its `max_tokens`.
        """
        left: Ints = np.maximum(max_tokens - num_outputs, 1)
        if not self.knows or known.all():
            return Expectation(left, np.zeros(len(left)))
        if self._sorted is None:
            self._sort()
        assert self._sorted is not None
        place = np.searchsorted(self._sorted, num_outputs / max_tokens, side="right")
        longer = np.maximum(len(self._sorted) - place, 1)
        mean = self._sums[place] / longer
        deviation = np.sqrt(np.maximum(self._squares[place] / longer - mean * mean, 0.0))
        total = np.rint((mean + self._MARGIN * deviation) * max_tokens).astype(np.int64)
        total = np.where(place == len(self._sorted), 2 * num_outputs, total)
        return Expectation(
            np.where(known, left, np.clip(total - num_outputs, 1, left)),
            np.where(known, 0.0, deviation * max_tokens),
        )

    def expected(self, plan: PrefixPlan) -> Ints:
        """Expected lengths of a plan's answers, [num_leaves]."""
        leaf_row = plan.tree.leaf_row
        known = np.array([p.ignore_eos for p in plan.params], dtype=np.bool_)
        return self.remaining(
            np.zeros_like(leaf_row), plan.max_tokens[leaf_row], known[plan.params_index[leaf_row]]
        ).tokens

    def knows_of(self, plan: PrefixPlan) -> bool:
        """Whether more is expected of a plan's answers than that they may be so long."""
        return self.knows or all(p.ignore_eos or p.max_tokens == 1 for p in plan.params)

    def drawn(self, plan: PrefixPlan, so_far: Floats = _NONE) -> Ints:
        """Lengths as a plan's answers may have them, [num_leaves]: some short, some long.

        They are spread as those of recent rows are, where `expected` gives all rows that are alike
        the same. Always the same draw; who has which length means nothing.

        Rows that finish first have short answers. What the others have by now (`so_far`, shares of
        what they may have, [n]) is made up for as Kaplan and Meier do (1958): a share's probability
        is that of ending there among all who got as far.
        """
        leaf_row = plan.tree.leaf_row
        most = plan.max_tokens[leaf_row]
        if not self.knows:
            return most
        known = np.array([p.ignore_eos for p in plan.params], dtype=np.bool_)
        recent = self._recent[: min(self._count, self._WINDOW)]
        shares = np.concatenate([recent, so_far])
        ends = np.arange(len(shares)) < len(recent)
        order = np.lexsort((~ends, shares))
        shares, ends = shares[order], ends[order]
        go_on = np.cumprod(1 - ends / np.arange(len(shares), 0, -1))
        # Who outlives all is taken to go on for as long again.
        shares = np.append(shares, min(2 * shares[-1], 1.0))
        chances = -np.diff(go_on, prepend=1.0, append=0.0)
        picked = np.random.default_rng(0).choice(shares, len(most), p=chances)
        lengths = np.maximum(np.rint(picked * most), 1).astype(np.int64)
        return np.where(known[plan.params_index[leaf_row]], most, lengths)

    def _sort(self) -> None:
        """Sort the recent shares, with the sums of each and all longer ones."""
        shares = np.sort(self._recent[: min(self._count, self._WINDOW)])
        self._sorted = shares
        self._sums = np.append(np.cumsum(shares[::-1])[::-1], 0.0)
        self._squares = np.append(np.cumsum((shares * shares)[::-1])[::-1], 0.0)
