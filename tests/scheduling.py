"""Tables, right answers and checks for tests that run a scheduler with the fake model."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from batchllm.engine import Engine
from batchllm.request import Request, SamplingParams
from batchllm.runner.fake_runner import fake_token
from batchllm.scheduler.batch import NO_TOKEN

MAX_MODEL_LEN = 64
EOS = frozenset({7})
POISON = frozenset({2, 11, 13})  # tokens that make whoever has read them fail


def tables(tokens):
    """Rows (prompt, max_tokens), over a vocabulary so small that prefixes collide."""
    prompts = st.lists(st.sampled_from(tokens), min_size=1, max_size=20)
    return st.lists(st.tuples(prompts, st.integers(1, 16)), min_size=1, max_size=20)


ROWS = tables([0, 1])
POISONED_ROWS = tables([0, 1] * 9 + [2])


def fill_carried(batch, sampled):
    """The batch with its carried tokens in their places.

    `sampled` int32 [num_samples of the batch before it] are that one's tokens. Where one has none,
    the 0 stays: what comes of it is discarded, but -1 would be no row of an embedding.
    """
    if len(batch.carried) == 0:
        return batch
    token_ids = batch.token_ids.copy()
    tokens = sampled[batch.carried.sample]
    token_ids[batch.carried.token] = np.where(tokens == NO_TOKEN, 0, tokens)
    return replace(batch, token_ids=token_ids)


class LateRunner:
    """Runs each step as late as a runner may: when the next is submitted, or its result is asked.

    So a batch is read after the scheduler has gone on, and what it holds must not have changed.
    """

    def __init__(self, runner):
        self.runner = runner
        self.steps = []  # submitted, and their results not asked yet

    def shrink(self, num_blocks):
        assert not self.steps, "a step still runs"
        return self.runner.shrink(num_blocks)

    def submit(self, batch):
        assert len(self.steps) < 2, "the scheduler can be one step ahead, no more"
        before = self.steps[-1] if self.steps else None
        if before:
            before.run()
        self.steps.append(LateStep(self, batch, before))
        return self.steps[-1]


class LateStep:
    def __init__(self, late, batch, before):
        self._late, self._batch, self._before = late, batch, before
        self._output = self._error = None

    def result(self):
        assert self._late.steps.pop(0) is self, "results are asked in another order"
        self.run()
        if self._error:
            raise self._error
        return self._output

    def run(self):
        """Run now, if it did not yet."""
        batch, before, self._before = self._batch, self._before, None
        if self._output or self._error:
            return
        try:
            if before and before._error:
                raise RuntimeError("the step before failed")
            if len(batch.carried):
                assert not batch.token_ids[batch.carried.token].any()
                batch = fill_carried(batch, before._output.token_ids)
            self._output = self._late.runner.execute(batch)
        except Exception as error:
            self._error = error


class CheckingEngine(Engine):
    """Checks the scheduler's books after every step, and before it who is said to run."""

    def __init__(self, scheduler, runner):
        super().__init__(scheduler, runner, before_step=self.everybody_is_known)

    def everybody_is_known(self, batch):
        leaves = np.union1d(self.scheduler.running_leaves(), batch.samples.leaf)
        running = [before.samples.leaf for before, _ in self._submitted]
        if running:  # a step that may be all in vain
            assert np.isin(running, leaves).all()
            assert len(leaves) <= len(self.scheduler._running) + len(running[0])
        else:
            assert len(leaves) == len(self.scheduler._running)

    def step(self):
        finished = super().step()
        if not self._submitted:
            self.scheduler.check()
        return finished

    def _submit(self):
        if self._submitted:  # what that one samples is expected
            self.scheduler.check()
        super()._submit()


def driver(runner, *, ahead):
    """The runner, or one that the engine keeps a step ahead of."""
    return LateRunner(runner) if ahead else runner


def requests(rows, **params):
    return [
        Request(i, np.array(p, np.int32), SamplingParams(max_tokens=m, **params))
        for i, (p, m) in enumerate(rows)
    ]


def is_poisoned(context):
    return not POISON.isdisjoint(context)


def expected_ending(prompt, max_tokens):
    """How a row ends with a runner that fails where a context `is_poisoned`, and its answer."""
    answer = expected_answer(prompt, max_tokens)
    for count in range(len(answer)):
        if is_poisoned([*prompt, *answer[:count]]):
            return "nan_logits", answer[:count]
    return "stop" if answer[-1] in EOS else "length", answer


def expected_answer(prompt, max_tokens, *, ignore_eos=False, vocab=50):
    context, answer = list(prompt), []
    while len(answer) < min(max_tokens, MAX_MODEL_LEN - len(prompt)):
        token = fake_token(context, vocab)
        answer.append(token)
        context.append(token)
        if token in EOS and not ignore_eos:
            break
    return answer
