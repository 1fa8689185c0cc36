"""Text to token ids and back, many at a time."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import processors

from batchllm.errors import ModelError
from batchllm.request import RaggedTokens, TokenIds
from batchllm.text.cuts import Cuts, longest_token
from batchllm.text.segments import segment

# Texts go to the tokenizer in batches of this many or this long: enough to keep every core busy,
# few enough that its per-token records (about 100 bytes each) stay small.
_BATCH_TEXTS, _BATCH_CHARS = 4096, 4_000_000
# Ids that no token has cost the library memory when it writes a tokenizer down.
_MOST_GAPS = 1_000_000


class Tokenizer:
    """A `tokenizers` backend with what a model needs to know about its special tokens.

    Truncation and padding are off. `chat_template` is Jinja source, or None for a model without
    one; `eos_token_ids` are all ids that end an answer. Text that spells a special token becomes
    that token, as it does in transformers.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None,
        eos_token: str | None,
        eos_token_ids: Sequence[int],
        chat_template: str | None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.eos_token_ids = tuple(eos_token_ids)
        self.chat_template = chat_template

    @classmethod
    def from_directory(cls, directory: Path, *, eos_token_ids: Sequence[int] = ()) -> "Tokenizer":
        """Read `tokenizer.json`, `tokenizer_config.json` and the chat template beside them.

        Args:
            directory: a model directory in the Hugging Face layout.
            eos_token_ids: what ends an answer; where empty, the tokenizer's own `eos_token`.

        Raises:
            ModelError: a file is missing or cannot be read.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{directory}: tokenizer.json is missing")
        with library_errors(f"{path}: not a tokenizer"):
            backend = tokenizers.Tokenizer.from_file(str(path))
        config = read_json(directory / "tokenizer_config.json", required=False)
        bos_token = _token_text(config.get("bos_token"))
        eos_token = _token_text(config.get("eos_token"))
        if "add_bos_token" in config or "add_eos_token" in config:
            # Like transformers, the switches win over what tokenizer.json would add.
            add_bos_and_eos(
                backend,
                bos_token if config.get("add_bos_token") else None,
                eos_token if config.get("add_eos_token") else None,
            )
        if not eos_token_ids and eos_token is not None:
            with library_errors(f"{path}: not a tokenizer"):
                eos_id = backend.token_to_id(eos_token)
            eos_token_ids = () if eos_id is None else (eos_id,)
        tokenizer = cls(
            backend,
            bos_token=bos_token,
            eos_token=eos_token,
            eos_token_ids=eos_token_ids,
            chat_template=_read_chat_template(directory, config),
        )
        count = backend.get_vocab_size(with_added_tokens=True)
        if tokenizer.vocab_size > 2 * count + _MOST_GAPS:
            raise ModelError(
                f"{path}: a token has the id {tokenizer.vocab_size - 1:,}, "
                f"though there are only {count:,} tokens"
            )
        return tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        with library_errors("the tokenizer has no vocabulary"):
            return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 of everything that decides which ids a prompt becomes, and when one ends."""
        rest = [self.chat_template, self.bos_token, self.eos_token, self.eos_token_ids]
        with library_errors("the tokenizer cannot be written"):
            text = f"{self._backend.to_str()}{json.dumps(rest)}"
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def longest_token(self) -> int | None:
        """The most bytes of a text that one token can stand for; None where that is not known."""
        return longest_token(self._backend)

    @cached_property
    def _cuts(self) -> Cuts | None:
        return Cuts.of(self._backend)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> RaggedTokens:
        """Tokenize many texts, in parallel, what they start with in common once.

        The tokens are `encode_batch_whole`'s.

        Args:
            texts: any number of strings.
            add_special_tokens: put BOS and EOS where the model's tokenizer does. A rendered chat
                template brings its own, and would get them twice.

        Raises:
            ModelError: the tokenizer fails on a text, as on a lone surrogate.
        """
        shared = None if self._cuts is None else segment(texts, self._cuts)
        if shared is None:
            return self.encode_batch_whole(texts, add_special_tokens=add_special_tokens)
        tokens = self.encode_batch_whole(shared.segments, add_special_tokens=False)
        return shared.join(tokens, self._cuts if add_special_tokens else None)

    def encode_batch_whole(self, texts: Sequence[str], *, add_special_tokens: bool) -> RaggedTokens:
        """Tokenize each text from its beginning to its end: the reference for `encode_batch`."""
        values: list[TokenIds] = []
        lengths: list[TokenIds] = []
        for batch in _batches(texts):
            with library_errors("the tokenizer fails on a text"):
                encodings = self._backend.encode_batch_fast(
                    batch, add_special_tokens=add_special_tokens
                )
                counts = np.fromiter(map(len, encodings), np.int32, len(encodings))
                ids = chain.from_iterable(encoding.ids for encoding in encodings)
                values.append(np.fromiter(ids, np.int32, int(counts.sum(dtype=np.int64))))
            lengths.append(counts)
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        if not values:
            return RaggedTokens(np.zeros(0, dtype=np.int32), offsets)
        np.cumsum(np.concatenate(lengths), out=offsets[1:])
        return RaggedTokens(np.concatenate(values), offsets)

    def decode_batch(self, sequences: Sequence[TokenIds]) -> list[str]:
        """Turn token ids back into text, special tokens left out.

        Raises:
            ModelError: the tokenizer fails on them.
        """
        ids = [sequence.tolist() for sequence in sequences]
        with library_errors("the tokenizer cannot decode an answer"):
            return self._backend.decode_batch(ids, skip_special_tokens=True)


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Make a ModelError that says `what` of all that the tokenizers library can raise.

    That is bare `Exception`s, and where its Rust code panics, one that is no `Exception` at all.
    """
    try:
        yield
    except (ModelError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ModelError(f"{what}: {first_line(error)}") from None


def add_bos_and_eos(
    backend: tokenizers.Tokenizer, bos_token: str | None, eos_token: str | None
) -> None:
    """Make `add_special_tokens` put these around every text (None: nothing there)."""
    with library_errors("the tokenizer cannot put its special tokens around a text"):
        around = {token: backend.token_to_id(token) for token in (bos_token, eos_token) if token}
        for token, token_id in around.items():
            if token_id is None:
                raise ModelError(f"the tokenizer adds {token!r}, which is not in its vocabulary")
        backend.post_processor = processors.TemplateProcessing(
            single=[token for token in (bos_token, "$A", eos_token) if token],
            special_tokens=list(around.items()),
        )


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """Read a JSON object; a missing file is an empty one unless it is required.

    Raises:
        ModelError: missing though required, unreadable, or not a JSON object.
    """
    if not path.is_file():
        if required:
            raise ModelError(f"{path.parent}: {path.name} is missing")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if len(batch) == _BATCH_TEXTS or chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _token_text(value: object) -> str | None:
    """A special token as its text; files hold the text or an object around it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _read_chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: cannot be read: {first_line(error)}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{directory}: the chat template in tokenizer_config.json is not text")
    return template


def first_line(error: BaseException) -> str:
    """An error in one line, for a message to the user."""
    return next(iter(str(error).splitlines()), type(error).__name__)
