"""A scheduler by the name of its policy."""

from collections.abc import Callable
from dataclasses import dataclass

from batchllm.cache.block_pool import BlockPool
from batchllm.cache.block_table import BlockHolder, BlockTables
from batchllm.prefix.policies.registry import STREAMING
from batchllm.scheduler.base import StepScheduler
from batchllm.scheduler.lengths import LengthEstimator
from batchllm.scheduler.scheduler import Scheduler
from batchllm.scheduler.streaming import StreamingScheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What a scheduler may use: KV blocks, and tokens and sequences in a step."""

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int


def make_scheduler(
    policy: str,
    limits: SchedulerLimits,
    eos_token_ids: frozenset[int] = frozenset(),
    lengths: LengthEstimator | None = None,
    *,
    holder: Callable[[BlockPool, int], BlockHolder] = BlockTables,
) -> StepScheduler:
    """The scheduler that runs plans of this policy.

    `lengths` may know something already; a simulation can do with `BlockCounts` as `holder`.
    """
    if policy == STREAMING:
        return StreamingScheduler(
            limits.num_blocks,
            limits.block_size,
            max_model_len=limits.max_model_len,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_num_seqs=limits.max_num_seqs,
            eos_token_ids=eos_token_ids,
        )
    return Scheduler(
        BlockPool(limits.num_blocks, limits.block_size),
        max_model_len=limits.max_model_len,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
        eos_token_ids=eos_token_ids,
        lengths=lengths,
        holder=holder,
    )
