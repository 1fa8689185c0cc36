"""How a window is planned for an engine, and planned again."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from batchllm.prefix.plan import PrefixPlan, plan_requests
from batchllm.prefix.policies.registry import AUTO, STREAMING
from batchllm.prefix.policies.sample import sample_first
from batchllm.request import Request
from batchllm.scheduler.base import StepScheduler
from batchllm.scheduler.factory import SchedulerLimits
from batchllm.scheduler.lengths import LengthEstimator
from batchllm.scheduler.scheduler import Scheduler
from batchllm.simulate.choose import Choice, choose_policy
from batchllm.simulate.cost import CostModel
from batchllm.simulate.second_look import SecondLook


@dataclass(kw_only=True)
class WindowPlanner:
    """Plans windows by a policy, with what has been learned of answers' lengths.

    `granularity` is as in `plan_tokens`. `chosen` is what `auto` took, for the windows so far.
    """

    policy: str
    sharing: bool
    granularity: int
    lengths: LengthEstimator
    costs: CostModel
    chosen: set[str] = field(default_factory=set)

    def plan(self, requests: Sequence[Request], limits: SchedulerLimits) -> PrefixPlan:
        """Plan a window, to be run within `limits`."""
        if self.policy == STREAMING:
            return plan_requests(requests, policy=STREAMING)
        plan = plan_requests(
            requests, policy="dfs", sharing=self.sharing, granularity=self.granularity
        )
        expected, knows = self.lengths.expected(plan), self.lengths.knows_of(plan)
        choice = Choice(self.policy)
        if self.policy == AUTO:
            outputs = self.lengths.drawn(plan)
            choice = choose_policy(plan, expected, limits, self.costs, outputs=outputs, knows=knows)
            self.chosen.add(str(choice))
        plan = choice.order(plan, expected)
        return plan if knows else replace(plan, leaf_order=sample_first(plan.tree, plan.leaf_order))

    def second_look(
        self, plan: PrefixPlan, scheduler: StepScheduler, limits: SchedulerLimits
    ) -> SecondLook | None:
        """Who chooses again for a window that is about to run on `scheduler`, if anyone."""
        if self.policy != AUTO or self.lengths.knows_of(plan):
            return None
        assert isinstance(scheduler, Scheduler), "auto takes no policy with another"
        return SecondLook(plan, scheduler, limits, self.costs, self.chosen)
