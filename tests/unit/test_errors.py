"""What users are told is one line that a terminal can be given, whatever was in a file."""

import pytest

from batchllm.errors import InputError, UsageError, one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain é 日本", "plain é 日本"),
        ("a\nb\x1b[2J\0", r"a\nb\x1b[2J\x00"),
        ("\ud800\u2028", r"\ud800\u2028"),
    ],
)
def test_messages_are_printable(text, line):
    assert str(InputError(text)) == line


def test_long_messages_keep_both_ends():
    message = str(UsageError("the start " + "x" * 100_000 + " the end"))
    assert message.startswith("the start xxx") and message.endswith("xxx the end")
    assert len(message) <= 1000
    assert len(one_line("\n" * 5000, 300)) <= 300
