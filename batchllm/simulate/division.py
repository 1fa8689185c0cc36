"""A plan divided among engines, by what the cost model says that its parts take."""

from batchllm.prefix.divide import Division, divide_tree
from batchllm.prefix.plan import PrefixPlan
from batchllm.prefix.tree import Ints
from batchllm.scheduler.factory import SchedulerLimits
from batchllm.simulate.cost import CostModel


def divide_plan(
    plan: PrefixPlan, outputs: Ints, limits: SchedulerLimits, costs: CostModel, count: int
) -> Division:
    """Divide a plan whose answers have `outputs` [num_leaves] tokens among `count` engines.

    Each runs within `limits`. What a token costs depends on how many there are in a step: prompts
    fill it, and there are as many decodes as there is KV memory for, if there are enough rows.
    """
    tree = plan.tree
    own = float((tree.leaf_length - tree.leaf_start + outputs).mean())
    most = min(limits.max_num_seqs, limits.num_blocks * limits.block_size / own)
    decodes = max(int(min(most, tree.num_leaves / count)), 1)
    return divide_tree(tree, outputs, costs.rates(limits.max_num_batched_tokens, decodes), count)
