"""A tokenizer built out of a GGUF file's metadata.

A GGUF has no `tokenizer.json`; it lists tokens with their types, merges or scores, and names how
text is split before merging. What follows from those names is llama.cpp's definition (its
`llama-vocab.cpp`), which is what the file was written for. transformers differs in one place that
matters: it does not know the pre-tokenizer `smollm` and falls back to GPT-2's, which treats
whitespace before a digit otherwise: an empty line before "1." gets ids the model never saw.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from batchllm.errors import ModelError
from batchllm.text.gguf_values import numbers, texts, typed
from batchllm.text.tokenizer import Tokenizer, add_bos_and_eos, library_errors

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_SPACE = "\u2581"
_WAY_OUT = "use the model's safetensors directory, which has a tokenizer.json"

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_DIGIT_THEN_GPT2 = (r"\p{N}", *_GPT2)


def _cl100k(digits: str) -> tuple[str]:
    """The split that Llama 3 and Qwen 2 share but for how many digits stay together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """Patterns that cut text, each applied to the pieces the one before left.

    `ignore_merges`: a piece that is a token as a whole is taken without merging.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = _PreTokenizer(_cl100k(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(_GPT2),
    "smollm": _PreTokenizer(_DIGIT_THEN_GPT2),
    "starcoder": _PreTokenizer(_DIGIT_THEN_GPT2),
    "refact": _PreTokenizer(_DIGIT_THEN_GPT2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _PreTokenizer(_cl100k(r"\p{N}")),
    "deepseek-r1-qwen": _PreTokenizer(_cl100k(r"\p{N}")),
    # What llama.cpp does with a file that does not say.
    "default": _PreTokenizer(
        (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
}

# Tokens that end an answer in one model family or another, by llama.cpp's list. A file names one
# end token, where a chat model often has two (<|im_end|> and <|endoftext|>).
_END_TOKENS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|end|>",
        "</s>",
        "<end_of_turn>",
    }
)


@dataclass(frozen=True, slots=True)
class GGUFSpecialIds:
    """Ids with a role; `end_of_generation` are all that end an answer, ascending."""

    bos: int | None
    eos: int | None
    unknown: int | None
    end_of_generation: tuple[int, ...]


def gguf_special_ids(metadata: Mapping[str, Any]) -> GGUFSpecialIds:
    """Find the special ids a GGUF file names, and the end tokens it merely has.

    Raises:
        ModelError: the file has no vocabulary, or an id lies outside it.
    """
    tokens = _tokens(metadata)
    types = _token_types(metadata, len(tokens))
    is_spm = typed(metadata, "tokenizer.ggml.model", str) == "llama"

    def named(key: str, default: int | None = None) -> int | None:
        token_id = typed(metadata, f"tokenizer.ggml.{key}_token_id", int)
        token_id = default if token_id is None else token_id
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise ModelError(
                f"tokenizer.ggml.{key}_token_id is {token_id}, outside the vocabulary of "
                f"{len(tokens):,} tokens"
            )
        return token_id

    eos = named("eos", 2 if is_spm and len(tokens) > 2 else None)
    ends = {i for i in np.flatnonzero(types == _CONTROL).tolist() if tokens[i] in _END_TOKENS}
    ends |= {i for i in (eos, named("eot"), named("eom")) if i is not None}
    return GGUFSpecialIds(
        bos=named("bos", 1 if is_spm and len(tokens) > 1 else None),
        eos=eos,
        unknown=named("unknown", 0 if is_spm else None),
        end_of_generation=tuple(sorted(ends)),
    )


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer a GGUF file describes.

    Raises:
        ModelError: a tokenizer that is not known here, or a damaged vocabulary.
    """
    tokens = _tokens(metadata)
    types = _token_types(metadata, len(tokens))
    special = gguf_special_ids(metadata)
    kind = typed(metadata, "tokenizer.ggml.model", str)
    add = {key: typed(metadata, f"tokenizer.ggml.add_{key}_token", bool) for key in ("bos", "eos")}
    with library_errors(f"the GGUF tokenizer is damaged ({_WAY_OUT})"):
        if kind == "gpt2":
            backend, add_bos = _byte_level_bpe(metadata, tokens)
        elif kind == "llama":
            backend, add_bos = _sentencepiece_bpe(metadata, tokens, types, special.unknown)
        else:
            raise ModelError(f"the GGUF tokenizer {kind!r} is not supported; {_WAY_OUT}")
        _add_whole_tokens(backend, tokens, types)
    bos_token = None if special.bos is None else tokens[special.bos]
    eos_token = None if special.eos is None else tokens[special.eos]
    add_bos_and_eos(
        backend,
        bos_token if (add_bos if add["bos"] is None else add["bos"]) else None,
        eos_token if add["eos"] else None,
    )
    return Tokenizer(
        backend,
        bos_token=bos_token,
        eos_token=eos_token,
        eos_token_ids=special.end_of_generation,
        chat_template=typed(metadata, "tokenizer.chat_template", str),
    )


def _byte_level_bpe(
    metadata: Mapping[str, Any], tokens: Sequence[str]
) -> tuple[tokenizers.Tokenizer, bool]:
    name = typed(metadata, "tokenizer.ggml.pre", str) or "default"
    pre_tokenizer = _PRE_TOKENIZERS.get(name)
    if pre_tokenizer is None:
        raise ModelError(
            f"the GGUF pre-tokenizer {name!r} is not supported "
            f"(supported: {', '.join(_PRE_TOKENIZERS)}); {_WAY_OUT}"
        )
    merges = texts(metadata, "tokenizer.ggml.merges")
    if merges is None:
        raise ModelError(f"the GGUF file has no tokenizer merges; {_WAY_OUT}")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[_merge(text) for text in merges],
            ignore_merges=pre_tokenizer.ignore_merges,
        )
    )
    cuts = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in pre_tokenizer.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, pre_tokenizer.add_bos


def _merge(text: str) -> tuple[str, str]:
    left, _, right = text.partition(" ")
    return left, right


def _sentencepiece_bpe(
    metadata: Mapping[str, Any],
    tokens: Sequence[str],
    types: NDArray[np.int32],
    unknown: int | None,
) -> tuple[tokenizers.Tokenizer, bool]:
    scores = numbers(metadata, "tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ModelError(f"the GGUF file has no score for each token; {_WAY_OUT}")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges_from_scores(tokens, scores, types),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else tokens[unknown],
        )
    )
    add_space = typed(metadata, "tokenizer.ggml.add_space_prefix", bool) is not False
    # As a normaliser, the space goes before every stretch of text between special tokens, which is
    # what llama.cpp does (and transformers' "legacy" Llama tokenizer).
    escape = normalizers.Replace(" ", _SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), escape]) if add_space else escape
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", left=1, right=0)] if add_space else steps
    )
    return backend, True


def _merges_from_scores(
    tokens: Sequence[str], scores: NDArray[Any], types: NDArray[np.int32]
) -> list[tuple[str, str]]:
    """The merges a SentencePiece vocabulary implies, best first.

    SentencePiece joins whichever two neighbours give the token of the highest score, so each way to
    cut a token in two is a merge of that token's rank. Tokens that never come out of merging
    (control, byte, user-defined) take no part.
    """
    whole = {_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE}
    usable = {t: float(s) for t, s, k in zip(tokens, scores, types, strict=True) if k not in whole}
    ranked = sorted((t for t in usable if len(t) > 1), key=lambda t: -usable[t])
    return [
        (token[:i], token[i:])
        for token in ranked
        # A longer left part first: where one token can be made at two overlapping places, that is
        # more often the leftmost, which SentencePiece prefers.
        for i in range(len(token) - 1, 0, -1)
        if token[:i] in usable and token[i:] in usable
    ]


def _add_whole_tokens(
    backend: tokenizers.Tokenizer, tokens: Sequence[str], types: NDArray[np.int32]
) -> None:
    """Have the tokens that are never cut recognised in text: control ones are special as well."""
    for kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
        special = kind != _USER_DEFINED
        added = [
            AddedToken(tokens[i], normalized=False, special=special)
            for i in np.flatnonzero(types == kind).tolist()
            if tokens[i]
        ]
        if special:
            backend.add_special_tokens(added)
        else:
            backend.add_tokens(added)


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = texts(metadata, "tokenizer.ggml.tokens")
    if not tokens:
        raise ModelError(f"the GGUF file has no vocabulary; {_WAY_OUT}")
    return tokens


def _token_types(metadata: Mapping[str, Any], count: int) -> NDArray[np.int32]:
    """Each token's type, int32 [count]; a file that does not tell has only normal ones."""
    types = numbers(metadata, "tokenizer.ggml.token_type")
    if types is None:
        return np.ones(count, dtype=np.int32)
    if len(types) != count:
        raise ModelError(f"the GGUF file has {len(types):,} token types for {count:,} tokens")
    return np.asarray(types, dtype=np.int32)
