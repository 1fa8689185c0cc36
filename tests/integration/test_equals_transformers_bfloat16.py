"""The same in bfloat16; a file of its own, so that a process asks one dtype's yardstick."""

import pytest
from test_equals_transformers import (  # noqa: F401  # pytest finds them here
    answers,
    llm,
    oracle,
    prompts,
    pytestmark,
    test_greedy_answers_equal,
    test_logits_agree,
    truth,
)


@pytest.fixture(scope="module")
def dtype():
    return "bfloat16"
