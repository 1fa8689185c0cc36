"""From finished sequences to what their rows get, and what is counted."""

import numpy as np

from batchllm.metrics import Metrics
from batchllm.prefix.plan import PrefixPlan
from batchllm.request import RequestOutput, RowError
from batchllm.scheduler.base import SchedulerStats, StepScheduler
from batchllm.scheduler.batch import FinishedSequence
from batchllm.scheduler.factory import SchedulerLimits
from batchllm.text.tokenizer import Tokenizer

_NO_TOKENS = np.zeros(0, dtype=np.int32)


def row_outputs(
    plan: PrefixPlan,
    finished: list[FinishedSequence],
    tokenizer: Tokenizer,
    scheduler: StepScheduler,
    limits: SchedulerLimits,
) -> list[RequestOutput]:
    """One output a row of the leaves that are finished; duplicates all get their leaf's answer.

    `scheduler` is the one that ran the plan, within `limits`.
    """
    texts = tokenizer.decode_batch([s.output_token_ids for s in finished])
    outputs = []
    tree = plan.tree
    for sequence, text in zip(finished, texts, strict=True):
        error = _error(sequence, scheduler, limits)
        begin, end = tree.row_offsets[sequence.leaf : sequence.leaf + 2].tolist()
        length = int(tree.leaf_length[sequence.leaf])
        for index, row in enumerate(tree.rows[begin:end].tolist()):
            fresh = sequence.num_fresh_prompt_tokens if index == 0 else 0
            outputs.append(
                RequestOutput(
                    row_index=int(plan.row_index[row]),
                    text=None if error else text,
                    output_token_ids=sequence.output_token_ids,
                    finish_reason=sequence.finish_reason,
                    prompt_tokens=length,
                    cached_tokens=0 if error else length - fresh,
                    error=error,
                )
            )
    return outputs


def failed_output(row: int, error: RowError) -> RequestOutput:
    """The output of a row that never came to the engine."""
    return RequestOutput(
        row_index=row,
        text=None,
        output_token_ids=_NO_TOKENS,
        finish_reason="error",
        prompt_tokens=0,
        cached_tokens=0,
        error=error,
    )


def count(
    plan: PrefixPlan,
    finished: list[FinishedSequence],
    outputs: list[RequestOutput],
    stats: SchedulerStats,
    peak_kv_blocks: int,
) -> Metrics:
    """What a window adds to a run's metrics, but for its seconds: `outputs` are of `finished`."""
    return Metrics(
        rows=len(outputs),
        failed=sum(o.error is not None for o in outputs),
        duplicate_rows=len(outputs) - len(finished),
        prompt_tokens=sum(o.prompt_tokens for o in outputs if o.error is None),
        computed_prompt_tokens=stats.computed_prompt_tokens,
        repeated_last_tokens=plan.tree.num_repeated_tokens,
        recomputed_tokens=stats.recomputed_tokens,
        output_tokens=sum(o.output_tokens for o in outputs),
        computed_output_tokens=sum(len(s.output_token_ids) for s in finished),
        vain_tokens=stats.vain_tokens,
        steps=stats.steps,
        preemptions=stats.preemptions,
        peak_kv_blocks=peak_kv_blocks,
    )


def _error(
    sequence: FinishedSequence, scheduler: StepScheduler, limits: SchedulerLimits
) -> RowError | None:
    match sequence.ending:
        case "kv_memory" as code:
            size = limits.block_size
            needed = scheduler.blocks_alone(sequence.leaf) * size
            return RowError(
                code,
                f"prompt and answer may need {needed:,} tokens of KV memory, there are "
                f"{limits.num_blocks * size:,}; give more with --kv-memory or lower --max-tokens",
            )
        case "nan_logits" as code:
            return RowError(
                code,
                "the model's logits for answer token "
                f"{len(sequence.output_token_ids) + 1} are NaN or infinite: its weights are "
                "damaged, or this row makes it overflow, which --dtype float32 may cure",
            )
        case _:
            return None
