"""A model's chat template: messages to the text the model was trained to continue.

The templates come with models from strangers, so they run in a sandbox with a budget, with the
extras that Hugging Face's renderer gives them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from batchllm.text.sandbox import LimitedEnvironment, render


class ChatTemplate:
    """A compiled chat template; rendering one conversation takes tens of microseconds.

    Raises:
        ValueError: the template is not valid Jinja.
    """

    def __init__(self, source: str, bos_token: str | None, eos_token: str | None) -> None:
        # A token the model lacks stays undefined, which renders as nothing and tests as false.
        tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._variables = {name: token for name, token in tokens.items() if token is not None}
        try:
            self._template = _ENVIRONMENT.compiled(source)
        except ValueError as error:
            raise ValueError(f"the chat template is not valid: {error}") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """Render one conversation.

        Args:
            messages: `{"role": …, "content": …}` and whatever else the template reads. A key
                whose value is None is left out, as templates test for keys and not for null.
            add_generation_prompt: end with the header of the answer to come.

        Raises:
            ValueError: the template refuses the conversation (its own message is kept), or fails.
        """
        plain = [{k: v for k, v in m.items() if v is not None} for m in messages]
        variables = {
            "messages": plain,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            **self._variables,
        }
        return render(self._template, variables)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks answers for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  # the base class's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
    default: Callable[[object], object] | None = None,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML. `default` replaces what JSON lacks."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=default,
    )


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    extras: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(extras)
    environment.limit_filter("tojson", to_json)
    return environment


# Immutable by its very class, so one serves all templates.
_ENVIRONMENT = _environment()
