"""Tables, right answers and checks for tests that run a scheduler with the fake model."""

import numpy as np
from hypothesis import strategies as st

from batchllm.engine import Engine
from batchllm.request import Request, SamplingParams
from batchllm.runner.fake_runner import fake_token

MAX_MODEL_LEN = 64
EOS = frozenset({7})
ROWS = st.lists(  # (prompt, max_tokens), over a vocabulary so small that prefixes collide
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=20), st.integers(1, 16)),
    min_size=1,
    max_size=20,
)


class CheckingEngine(Engine):
    """Checks the scheduler's books after every step."""

    def step(self):
        finished = super().step()
        self.scheduler.check()
        return finished


def requests(rows, **params):
    return [
        Request(i, np.array(p, np.int32), SamplingParams(max_tokens=m, **params))
        for i, (p, m) in enumerate(rows)
    ]


def expected_answer(prompt, max_tokens, *, ignore_eos=False, vocab=50):
    context, answer = list(prompt), []
    while len(answer) < min(max_tokens, MAX_MODEL_LEN - len(prompt)):
        token = fake_token(context, vocab)
        answer.append(token)
        context.append(token)
        if token in EOS and not ignore_eos:
            break
    return answer
