"""A runner without a model, for tests of everything around one."""

from collections.abc import Callable

import numpy as np

from batchllm.runner.model_input import ModelInput, build_model_input
from batchllm.scheduler.batch import NO_TOKEN, Batch, StepOutput

_EMPTY = -1


class FakeRunner:
    """Answers with a hash of the whole context, read back through the KV blocks.

    A slot of its "KV cache" holds the token written there. To sample, it collects the tokens that
    the attention items let the query see, in order, so a wrong block, slot, position, mask or a
    block freed too early changes the answer or trips an assertion. The next token depends on every
    token before it and on nothing else. Where a context `fails`, its logits are no numbers.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        vocab_size: int = 50,
        fails: Callable[[list[int]], bool] = lambda context: False,
    ) -> None:
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._fails = fails
        self._slots = np.full(num_blocks * block_size, _EMPTY, dtype=np.int64)
        self.num_computed_tokens = 0

    def execute(self, batch: Batch) -> StepOutput:
        """Run one step."""
        step = build_model_input(batch, self._block_size)
        assert len(np.unique(step.slots)) == len(step.slots), "two tokens written to one slot"
        self._slots[step.slots] = step.token_ids
        self.num_computed_tokens += len(step.token_ids)
        tokens = [self._next_token(step, row) for row in step.sample_rows.tolist()]
        return StepOutput(np.array(tokens, dtype=np.int32))

    def _next_token(self, step: ModelInput, row: int) -> int:
        context = self.context(step, row)
        assert len(context) == step.positions[row] + 1, "the items do not cover the context"
        assert _EMPTY not in context, "a token is read that was never written"
        assert context[-1] == step.token_ids[row], "the query does not see itself last"
        return NO_TOKEN if self._fails(context) else fake_token(context, self._vocab_size)

    def context(self, step: ModelInput, row: int) -> list[int]:
        """The tokens a query sees, in the order of their positions."""
        items = step.items
        covering = np.flatnonzero((items.query_begin <= row) & (row < items.query_end))
        seen: list[int] = []
        for item in sorted(covering.tolist(), key=lambda i: int(items.kv_start[i])):
            assert items.kv_start[item] == len(seen), "the items overlap or leave a gap"
            visible = items.kv_len[item]
            if items.own[item]:
                visible -= items.query_end[item] - 1 - row
            slots = items.blocks(item)[:, None] * self._block_size + np.arange(self._block_size)
            seen += self._slots[slots.ravel()[:visible]].tolist()
        return seen


def fake_token(context: list[int], vocab_size: int) -> int:
    """Return the token the fake model answers to a context."""
    state = 0x9E3779B97F4A7C15
    for token in context:
        state = ((state ^ (token + 1)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 29
    return state % vocab_size
