"""From a table's rows to token ids, one window at a time.

A row that cannot be a prompt gets an error and zero tokens; the others go on.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchllm.errors import ModelError, UsageError, one_line
from batchllm.request import RaggedTokens, Request, RowError, SamplingParams
from batchllm.text import columns, ragged
from batchllm.text.chat import ChatTemplate
from batchllm.text.field_order import ColumnRules
from batchllm.text.messages import parse_messages
from batchllm.text.prompt_spec import PromptSpec
from batchllm.text.template import RowTemplate
from batchllm.text.tokenizer import Tokenizer

__all__ = ["PromptBatch", "PromptBuilder", "PromptSpec"]


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """A window's prompts, one per row in order.

    `errors` maps row numbers within the window to what is wrong; such a row has zero tokens.
    `max_tokens` is int32 [num_rows], 0 for the job's own limit; None without such a column.
    """

    tokens: RaggedTokens
    errors: dict[int, RowError]
    max_tokens: NDArray[np.int32] | None

    @classmethod
    def concat(cls, batches: Sequence["PromptBatch"]) -> "PromptBatch":
        """All rows, one batch behind the other."""
        starts = np.cumsum([0, *(len(batch.tokens) for batch in batches)]).tolist()
        errors = {
            start + row: error
            for start, batch in zip(starts, batches, strict=False)
            for row, error in batch.errors.items()
        }
        max_tokens = None
        if any(batch.max_tokens is not None for batch in batches):
            zeros = [np.zeros(len(batch.tokens), dtype=np.int32) for batch in batches]
            limits = [b.max_tokens for b in batches]
            max_tokens = np.concatenate(
                [z if m is None else m for z, m in zip(zeros, limits, strict=True)]
            )
        lengths = np.concatenate([batch.tokens.lengths for batch in batches])
        values = np.concatenate([batch.tokens.values for batch in batches])
        tokens = RaggedTokens(values, np.concatenate([[0], np.cumsum(lengths)]))
        return cls(tokens, errors, max_tokens)

    def requests(
        self, sampling_params: SamplingParams, row_index: NDArray[np.int64]
    ) -> tuple[list[Request], dict[int, RowError]]:
        """What the rows ask, where they can, and by row index the errors of the rest.

        `row_index` are the rows' numbers in the whole input, [num_rows].
        """
        by_length: dict[int, SamplingParams] = {0: sampling_params}
        requests = []
        for row, index in enumerate(row_index.tolist()):
            if row in self.errors:
                continue
            limit = 0 if self.max_tokens is None else int(self.max_tokens[row])
            if limit not in by_length:
                by_length[limit] = replace(sampling_params, max_tokens=limit)
            requests.append(Request(index, self.tokens[row], by_length[limit]))
        return requests, {int(row_index[row]): error for row, error in self.errors.items()}


class PromptBuilder:
    """Makes prompts of tables as a spec says, for one model.

    Args:
        spec: where prompts come from.
        tokenizer: the model's.
        max_model_len: prompt and answer together; a prompt must leave room for one token.
        vocab_size: the model's number of embeddings, where it differs from the tokenizer's.
        field_rules: what was learned for `spec.reorder_fields`; None keeps the template's order.

    Raises:
        UsageError: the spec wants a chat template and the model has none, or has a broken one.
    """

    def __init__(
        self,
        spec: PromptSpec,
        tokenizer: Tokenizer,
        max_model_len: int,
        *,
        vocab_size: int | None = None,
        field_rules: ColumnRules | None = None,
    ) -> None:
        self._made_of = (spec, tokenizer, max_model_len, vocab_size, field_rules)
        self._spec = spec
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size or tokenizer.vocab_size
        self._chat = _chat_template(spec, tokenizer)
        self._template = None if spec.template is None else RowTemplate(spec.template)
        self._field_rules = field_rules

    def __reduce__(self) -> tuple[Any, ...]:
        """Compiled templates do not pickle: another process compiles its own."""
        return _rebuild, self._made_of

    def build(self, table: pa.Table) -> PromptBatch:
        """Render, wrap and tokenize one window; only the spec's columns are touched."""
        spec = self._spec
        errors: dict[int, RowError] = {}
        max_tokens = None
        if spec.max_tokens_column is not None:
            max_tokens = columns.max_tokens_rows(table[spec.max_tokens_column], errors)
        if spec.token_ids_column is not None:
            column = table[spec.token_ids_column]
            tokens = columns.token_rows(column, self._vocab_size, errors)
        else:
            tokens = self._encode(self._texts(table, errors), errors)
        self._check_lengths(tokens, errors)
        return PromptBatch(
            ragged.without_rows(tokens, list(errors)), dict(sorted(errors.items())), max_tokens
        )

    def columns_of(self, schema: pa.Schema) -> list[str]:
        """The columns of the input that prompts are made of, in its order; at least one.

        A template may need none, but its rows still have to be counted.
        """
        needed = self._spec.columns_of(schema)
        return [name for name in schema.names if name in needed] or schema.names[:1]

    def keys(self, table: pa.Table) -> list[bytes | None]:
        """Bytes quick to make of each row that sort as its prompt does, for choosing windows.

        Rows whose keys share a long prefix have prompts that share one. A bad row's key is None.
        """
        errors: dict[int, RowError] = {}
        keys: list[bytes | None]
        if self._spec.token_ids_column is None:
            texts = self._texts(table, errors, wrap=self._spec.messages_column is not None)
            keys = [text.encode("utf-8", "surrogatepass") for text in texts]
        else:
            column = table[self._spec.token_ids_column]
            tokens = columns.token_rows(column, self._vocab_size, errors)
            keys = [ids.astype(">i4").tobytes() for ids in tokens]
        return [None if row in errors else key for row, key in enumerate(keys)]

    def _texts(
        self, table: pa.Table, errors: dict[int, RowError], *, wrap: bool = True
    ) -> list[str]:
        """The text of each row to tokenize; "" where there is an error.

        `wrap=False` leaves the chat template out, which does not change what sorts before what.
        """
        spec = self._spec
        make: Callable[[Any], str]
        if spec.messages_column is not None:
            values = columns.python_values(table[spec.messages_column], errors)
            make = self._from_messages
        elif self._template is not None:
            values = self._rows(table, self._template.columns_of(table.column_names), errors)
            make = self._wrapped_row if wrap else self._from_row
        else:
            assert spec.prompt_column is not None
            values = columns.python_values(table[spec.prompt_column], errors)
            make = self._wrapped if wrap else self._from_text
        texts = [""] * len(values)
        for row, value in enumerate(values):
            if row not in errors:
                try:
                    texts[row] = make(value)
                except _RowProblemError as problem:
                    errors[row] = problem.error
        return texts

    def _rows(
        self, table: pa.Table, names: Sequence[str], errors: dict[int, RowError]
    ) -> list[dict[str, Any]]:
        """The rows as dicts of these columns, in each row's own order where there are rules."""
        by_column = [columns.python_values(table[name], errors) for name in names]
        cells = zip(*by_column, strict=True) if by_column else [()] * len(table)
        rows = [dict(zip(names, values, strict=True)) for values in cells]
        if self._field_rules is None:
            return rows
        orders = self._field_rules.orders(table)
        return [
            {name: row[name] for name in (*order, *row)}
            for order, row in zip(orders, rows, strict=True)
        ]

    def _from_text(self, text: str | None) -> str:
        if text is None:
            raise _RowProblemError("null_prompt", "the prompt is null")
        return text

    def _wrapped(self, text: str | None) -> str:
        text = self._from_text(text)
        if self._chat is None:
            return text
        return self._render_chat([{"role": "user", "content": text}])

    def _from_row(self, row: Mapping[str, Any]) -> str:
        assert self._template is not None
        try:
            return self._template.render(row, own_order=self._field_rules is not None)
        except ValueError as error:
            raise _RowProblemError("template_error", str(error)) from None

    def _wrapped_row(self, row: Mapping[str, Any]) -> str:
        return self._wrapped(self._from_row(row))

    def _from_messages(self, value: object) -> str:
        if value is None:
            raise _RowProblemError("null_prompt", "the messages are null")
        try:
            messages = parse_messages(value)
        except ValueError as error:
            raise _RowProblemError("invalid_messages", str(error)) from None
        return self._render_chat(messages)

    def _render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        assert self._chat is not None
        if self._spec.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._spec.system}, *messages]
        try:
            return self._chat.render(messages)
        except ValueError as error:
            raise _RowProblemError("template_error", f"the chat template: {error}") from None

    def _encode(self, texts: list[str], errors: dict[int, RowError]) -> RaggedTokens:
        for row, text in enumerate(texts):
            # Only JSON and templates can bring a lone surrogate, but one would fail the batch.
            if not _encodable(text):
                texts[row] = ""
                errors[row] = RowError("invalid_utf8", "the text has a lone surrogate")
            elif len(text) > self._quick_chars and (least := self._least_tokens(text)):
                texts[row] = ""
                errors[row] = self._too_long(f"at least {least:,}")
        unique = list(dict.fromkeys(texts))
        tokens = self._encode_unique(unique, texts, errors)
        if len(unique) < len(texts):
            number = {text: i for i, text in enumerate(unique)}
            tokens = ragged.take_rows(tokens, np.array([number[t] for t in texts], dtype=np.int64))
        # A tokenizer with tokens added after training can have more than the model.
        for row in ragged.rows_with(tokens.values >= self._vocab_size, tokens.offsets):
            error = columns.outside_vocabulary(int(tokens[row].max()), self._vocab_size)
            errors.setdefault(row, error)
        return tokens

    def _encode_unique(
        self, unique: list[str], texts: list[str], errors: dict[int, RowError]
    ) -> RaggedTokens:
        """Tokenize all at once; where that fails, each alone, to find those to blame."""
        add_special_tokens = self._chat is None
        try:
            return self._tokenizer.encode_batch(unique, add_special_tokens=add_special_tokens)
        except ModelError:
            pass
        found = []
        failures: dict[str, RowError] = {}
        for text in unique:
            try:
                tokens = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
                found.append(tokens.values)
            except ModelError as error:
                found.append(np.zeros(0, dtype=np.int32))
                failures[text] = RowError("tokenizer_error", str(error))
        for row, text in enumerate(texts):
            if text in failures:
                errors.setdefault(row, failures[text])
        return RaggedTokens.from_sequences(found)

    @cached_property
    def _quick_chars(self) -> int:
        """A text of no more characters may fit, whatever it is made of."""
        longest = self._tokenizer.longest_token
        return sys.maxsize if longest is None else self._max_model_len * longest // 4

    def _least_tokens(self, text: str) -> int:
        """How many tokens a text has at least, where those are too many; else 0."""
        longest = self._tokenizer.longest_token
        assert longest is not None
        least = -(-len(text.encode()) // longest)
        return least if least >= self._max_model_len else 0

    def _too_long(self, tokens: str) -> RowError:
        message = (
            f"the prompt has {tokens} tokens, and the model's length of {self._max_model_len:,} "
            "must hold one more"
        )
        return RowError("prompt_too_long", message)

    def _check_lengths(self, tokens: RaggedTokens, errors: dict[int, RowError]) -> None:
        lengths, limit = tokens.lengths, self._max_model_len
        for row in np.flatnonzero(lengths == 0).tolist():
            errors.setdefault(row, RowError("empty_prompt", "the prompt has no tokens"))
        for row in np.flatnonzero(lengths >= limit).tolist():
            errors.setdefault(row, self._too_long(f"{lengths[row]:,}"))


def _rebuild(
    spec: PromptSpec,
    tokenizer: Tokenizer,
    max_model_len: int,
    vocab_size: int | None,
    field_rules: ColumnRules | None,
) -> PromptBuilder:
    return PromptBuilder(
        spec, tokenizer, max_model_len, vocab_size=vocab_size, field_rules=field_rules
    )


class _RowProblemError(Exception):
    """Carries a row's error up to the loop over rows."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        # A template's own words can be long, and hold the row's text.
        self.error = RowError(code, one_line(" ".join(message.split()), 300))


def _chat_template(spec: PromptSpec, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template to wrap rows in, or None where text goes to the model as it is."""
    source = tokenizer.chat_template
    if spec.token_ids_column is not None or spec.chat is False:
        return None
    if source is None:
        needs = {
            "messages": spec.messages_column is not None,
            "chat": spec.chat is not None,
            "a system message": spec.system is not None,
        }
        for what, needed in needs.items():
            if needed:
                raise UsageError(
                    f"the model has no chat template, which is needed for {what}; use a model "
                    "trained for chat, or a prompt column or template without it"
                )
        return None
    try:
        return ChatTemplate(source, tokenizer.bos_token, tokenizer.eos_token)
    except ValueError as error:
        raise UsageError(f"{error}; switch chat off to use the model without it") from None


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
