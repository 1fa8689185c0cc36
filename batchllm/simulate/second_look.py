"""Choosing once more, when more is known."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.plan import PrefixPlan
from batchllm.scheduler.factory import SchedulerLimits
from batchllm.scheduler.scheduler import Scheduler
from batchllm.simulate.choose import Choice, choose_policy, sample_leaves
from batchllm.simulate.cost import CostModel

Ints = NDArray[np.int64]
_LEAST = 64  # answers that must have ended
_BEGIN, _APPLY = 0.10, 0.12  # of a window's answers


class SecondLook:
    """Chooses again for the rest of a window of whose answers' lengths nothing was known.

    When a tenth of the answers have ended, it is chosen for the rows that have not begun, by how
    long answers are: in another thread, since steps must not wait for that. What is chosen holds as
    soon as 12 % have ended, neither before nor later: else the same job would run in other steps
    each time.
    """

    def __init__(
        self,
        plan: PrefixPlan,
        scheduler: Scheduler,
        limits: SchedulerLimits,
        costs: CostModel,
        chosen: set[str],
    ) -> None:
        """`scheduler` is about to run `plan`; what is chosen is added to `chosen`."""
        self._plan, self._scheduler = plan, scheduler
        self._limits, self._costs, self._chosen = limits, costs, chosen
        count = plan.tree.num_leaves
        self._begin = max(int(_BEGIN * count), _LEAST)
        self._apply = max(int(_APPLY * count), self._begin + 1)
        self._choosing: Future[tuple[Choice, PrefixPlan]] | None = None
        self._is_over = False

    def after_step(self, num_ended: int) -> None:
        """Look whether it is time, now that so many answers have ended."""
        if self._is_over or num_ended < self._begin:
            return
        if self._choosing is None:
            self._choosing = self._start()
        if num_ended >= self._apply:
            self._is_over = True
            choice, plan = self._choosing.result()
            self._scheduler.rearrange(plan)
            self._chosen.add(str(choice))

    def _start(self) -> Future[tuple[Choice, PrefixPlan]]:
        plan, lengths = self._plan, self._scheduler.lengths
        choose = partial(
            self._choose,
            np.sort(self._scheduler.leaves_not_begun()),
            expected=lengths.expected(plan),
            outputs=lengths.drawn(plan, self._scheduler.shares_so_far()),
            knows=lengths.knows_of(plan),
        )
        pool = ThreadPoolExecutor(max_workers=1)
        try:
            choosing = pool.submit(choose)
        except RuntimeError:  # memory is too short to start a thread
            choosing = Future()
            choosing.set_result(choose())
        pool.shutdown(wait=False)
        return choosing

    def _choose(
        self, leaves: Ints, *, expected: Ints, outputs: Ints, knows: bool
    ) -> tuple[Choice, PrefixPlan]:
        rest, leaves = sample_leaves(self._plan, leaves)
        choice = choose_policy(
            rest,
            expected[leaves],
            self._limits,
            self._costs,
            outputs=outputs[leaves],
            knows=knows,
        )
        return choice, choice.order(self._plan, expected)
