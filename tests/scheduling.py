"""Tables, right answers and checks for tests that run a scheduler with the fake model."""

import numpy as np
from hypothesis import strategies as st

from batchllm.engine import Engine
from batchllm.request import Request, SamplingParams
from batchllm.runner.fake_runner import fake_token

MAX_MODEL_LEN = 64
EOS = frozenset({7})
POISON = frozenset({2, 11, 13})  # tokens that make whoever has read them fail


def tables(tokens):
    """Rows (prompt, max_tokens), over a vocabulary so small that prefixes collide."""
    prompts = st.lists(st.sampled_from(tokens), min_size=1, max_size=20)
    return st.lists(st.tuples(prompts, st.integers(1, 16)), min_size=1, max_size=20)


ROWS = tables([0, 1])
POISONED_ROWS = tables([0, 1] * 9 + [2])


class CheckingEngine(Engine):
    """Checks the scheduler's books after every step, and before it who is said to run."""

    def __init__(self, scheduler, runner):
        super().__init__(scheduler, runner, before_step=self.everybody_is_known)

    def everybody_is_known(self, batch):
        leaves = np.union1d(self.scheduler.running_leaves(), batch.samples.leaf)
        assert len(leaves) == len(self.scheduler._running)

    def step(self):
        finished = super().step()
        self.scheduler.check()
        return finished


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
