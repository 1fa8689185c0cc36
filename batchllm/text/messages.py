"""A cell of a messages column as a conversation."""

import json
from typing import Any


def parse_messages(value: object) -> list[dict[str, Any]]:
    """Read one conversation: a list of messages, or JSON text of one.

    A message is an object with a `role` and a `content`, which is text or a list of parts; an
    assistant's tool call may do without content. Other keys are kept for the chat template.

    Raises:
        ValueError: not that; the message says what is wrong, and where.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the messages are not valid JSON: {error}") from None
    if not isinstance(value, list):
        raise ValueError(f"the messages are {_kind(value)}, not a list")
    if not value:
        raise ValueError("there are no messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"message {i} is {_kind(message)}, not an object")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise ValueError(f"message {i} has no role")
        if content is None and not message.get("tool_calls"):
            raise ValueError(f"message {i} has no content")
        if not isinstance(content, str | list | None):
            raise ValueError(f"message {i} has {_kind(content)} as content, not text")
    return value


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
