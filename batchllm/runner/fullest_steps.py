"""The steps that need most memory, to be run once before what is left becomes KV."""

from dataclasses import dataclass, replace

import numpy as np

from batchllm.config import StepLimits
from batchllm.request import SamplingParams
from batchllm.scheduler.batch import Batch, Chunks, Samples, SharedReads

_DRAWN = SamplingParams(temperature=1.0, top_k=50, top_p=0.9)
_GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True)
class FullestSteps:
    """A step of each kind, and how many blocks of KV they need; they are in nobody's way.

    `prompts` are few long ones, `sampling` is as many tokens for as many sequences as there may be,
    all drawn at random, `decodes` one token for each of them.
    """

    prompts: Batch
    sampling: Batch
    decodes: Batch
    num_blocks: int

    @classmethod
    def of(cls, limits: StepLimits, max_model_len: int, block_size: int) -> "FullestSteps":
        """The fullest that these limits allow."""
        num_tokens = max(limits.max_num_batched_tokens, limits.max_num_seqs)
        num_prompts = -(-num_tokens // max_model_len)
        steps = (
            _batch(num_prompts, num_tokens, block_size, _GREEDY),
            _batch(limits.max_num_seqs, num_tokens, block_size, _DRAWN),
            _batch(limits.max_num_seqs, limits.max_num_seqs, block_size, _GREEDY),
        )
        return cls(*steps, num_blocks=max(int(step.tables.max()) + 1 for step in steps))


def decodes_of(max_num_rows: int, num_blocks: int, block_size: int) -> Batch | None:
    """A step of decodes that together read all of `num_blocks`, and nothing twice.

    None where there are not even two.
    """
    num_rows = min(max_num_rows, num_blocks)
    if num_rows < 2:
        return None
    each = num_blocks // num_rows
    step = _batch(num_rows, num_rows, block_size, _GREEDY)
    seen = np.full(num_rows, each * block_size - 1)
    return replace(
        step,
        chunks=Chunks(count=np.ones_like(seen), start=seen, offset=seen),
        tables=np.arange(num_rows * each, dtype=np.int32).reshape(num_rows, each),
        num_decodes=num_rows,
    )


def _batch(num_chunks: int, num_tokens: int, block_size: int, params: SamplingParams) -> Batch:
    """Chunks of prompts from their beginning, as equal as may be, a sample of each."""
    chunks = np.arange(num_chunks)
    count = num_tokens // num_chunks + (chunks < num_tokens % num_chunks)
    num_blocks = -(-count // block_size)
    begin = np.cumsum(num_blocks) - num_blocks
    none = np.zeros(0, dtype=np.int64)
    nothing = np.zeros_like(chunks)
    return Batch(
        token_ids=np.zeros(num_tokens, dtype=np.int32),
        chunks=Chunks(count=count, start=nothing, offset=nothing),
        shared=SharedReads(none, none, none, none),
        tables=np.minimum(
            begin[:, None] + np.arange(num_blocks.max()), num_blocks.sum() - 1
        ).astype(np.int32),
        samples=Samples(chunks, chunks, chunks, chunks, nothing, nothing, params=[params]),
        num_decodes=0,
    )
