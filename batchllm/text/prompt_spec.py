"""What the user asked to be made into prompts, checked before anything is read."""

from dataclasses import dataclass

import pyarrow as pa

from batchllm.errors import UsageError
from batchllm.text import columns
from batchllm.text.template import RowTemplate

_SOURCES = {
    "prompt_column": "a prompt column",
    "messages_column": "a messages column",
    "token_ids_column": "a token-ids column",
    "template": "a template",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSpec:
    """Where a row's prompt comes from; exactly one of the first four is given.

    `chat` wraps text as a user's message in the model's chat template; None does so where the model
    has one. `system` is the system message of chats; a row whose messages bring their own keeps it.
    `max_tokens_column` limits each row's answer; a null there means the job's own limit.
    `reorder_fields` puts the fields of a template's objects (`row | tojson`) in an order of each
    row's own, so that rows share longer prefixes; it can change answers.

    Raises:
        UsageError: a combination that makes no sense, or a template that is not valid.
    """

    prompt_column: str | None = None
    messages_column: str | None = None
    token_ids_column: str | None = None
    template: str | None = None
    system: str | None = None
    chat: bool | None = None
    max_tokens_column: str | None = None
    reorder_fields: bool = False

    def __post_init__(self) -> None:
        given = [words for field, words in _SOURCES.items() if getattr(self, field) is not None]
        if len(given) != 1:
            problem = f"{' and '.join(given)} exclude each other" if given else "no prompt is given"
            raise UsageError(f"{problem}; give one of: {', '.join(_SOURCES.values())}")
        if self.template is not None and not self.template.strip():
            raise UsageError("the template is empty")
        template = None if self.template is None else RowTemplate(self.template)
        if self.reorder_fields and (template is None or not template.prints_object):
            raise UsageError(
                "there are no fields to reorder: the prompt must come from a template that prints "
                'an object, {{ row | tojson }} or {{ row["a", "b"] | tojson }}; without one, leave '
                "out reorder_fields"
            )
        if self.messages_column is not None and self.chat is False:
            raise UsageError(
                "messages need the chat template, but chat is switched off; leave it on"
            )
        if self.token_ids_column is not None and self.chat:
            raise UsageError(
                "token ids are taken as they are; leave out chat, or use a text column"
            )
        if self.system is not None and (self.chat is False or self.token_ids_column is not None):
            raise UsageError(
                "a system message needs a chat, which "
                + ("is switched off" if self.chat is False else "token ids are not")
                + "; leave out one of the two"
            )

    def columns_of(self, schema: pa.Schema) -> tuple[str, ...]:
        """The columns, of an input that has this schema, that prompts are made of, each once."""
        if self.template is not None:
            source: tuple[str | None, ...] = RowTemplate(self.template).columns_of(schema.names)
        else:
            source = (self.prompt_column, self.messages_column, self.token_ids_column)
        needed = (*source, self.max_tokens_column)
        return tuple(dict.fromkeys(name for name in needed if name is not None))

    def check(self, schema: pa.Schema) -> None:
        """Hold the spec against the input's columns.

        Raises:
            UsageError: a column is missing or of a wrong type.
        """
        wanted = (
            (self.prompt_column, "prompt column", columns.is_text, "text"),
            (
                self.messages_column,
                "messages column",
                columns.is_messages,
                "a list of structs with role and content, or JSON text of that",
            ),
            (
                self.token_ids_column,
                "token-ids column",
                columns.is_list_of_integers,
                "a list of integers",
            ),
            (self.max_tokens_column, "max-tokens column", columns.is_integer, "integers"),
        )
        for name, role, accepts, wants in wanted:
            if name is not None:
                columns.check_column(schema, name, role=role, accepts=accepts, wants=wants)
        if self.template is not None:
            for name in RowTemplate(self.template).columns_of(schema.names):
                columns.check_column(
                    schema, name, role="template column", accepts=lambda _: True, wants="anything"
                )
