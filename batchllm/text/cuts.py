"""Where a tokenizer's texts may be cut without a token changing."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from batchllm.request import TokenIds

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K_WORDS = {
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIXES}?",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIXES}?",
}
# The alternatives that patterns are made of for which `Cuts` argues: GPT-2's, cl100k's (Llama 3,
# Qwen 2), o200k's, and runs of digits or punctuation as in GGUF's default.
_WORDS = {r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", *_O200K_WORDS}
_UNDERSTOOD = {
    *_GPT2.split("|"),
    *_WORDS,
    _SUFFIXES,
    *(r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r"[0-9][0-9][0-9]"),
    *(r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+"),
    r"[\p{P}\$\+<=>\^~\|]+",
}
# Escapes, classes and groups hold their own `|`.
_ALTERNATIVE = re.compile(r"(?:\\.|\[(?:\\.|[^]\\])*\]|\([^()]*\)|[^]|\\[()])+")

_SPACE = r" (?<=\w )"
_NEWLINE = r"\n(?<=[A-Za-z0-9]\n)"
# Only where the normalizers leave these alone: NFD takes the voicing marks off kana, and NFKC makes
# ASCII of the punctuation, which added tokens may hold.
_CHINESE = "[、。，！？：；](?<=[一-龥ぁ-ゖァ-ヺー][、。，！？：；])"  # noqa: RUF001
_BREAKS = re.compile(r"[\s、。，！？：；]")  # noqa: RUF001
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}
_LEAVE_CHINESE_ALONE = {"NFC", "Lowercase"}


@dataclass(frozen=True, slots=True)
class Cuts:
    """The places where a text's tokens are those of its two parts, and what goes around them.

    `place` matches from anywhere up to and with the last character s that a part may start with.
    Cut there, between x and s, a text goes through every step of the `tokenizers` library
    (0.23, `encode_single_sequence`) as its parts do:

    - Added tokens are found leftmost-longest. None holds whitespace or an s, so none spans the cut
      or starts at it; `single_word` sees no word at s, `lstrip` stops at x, and no `rstrip` token
      can end with x.
    - The normalizers go by character but for combining marks, and no s is or makes one; no x
      becomes whitespace.
    - Patterns look behind nowhere and ahead only past whitespace. By alternative (`_UNDERSTOOD`):
      those with whitespace in them hold no x before it; words end with x or before; ` ?` and
      `[^…]?` take an s as their first character only; what punctuation takes after it needs
      punctuation for x. So no match spans the cut, and none before it depends on what follows.
      From the first pattern that matches words and whitespace on, the cut is a boundary.
    - `add_prefix_space` adds nothing to a part that starts with a space, the only s it allows.
    - The model (BPE without dropout) sees one pre-token at a time.

    `before` and `after` are the ids that `add_special_tokens` puts around a text.
    """

    place: re.Pattern[str]
    before: TokenIds
    after: TokenIds

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> "Cuts | None":
        """What is known of a tokenizer; None where any part of it is not understood."""
        model = backend.model
        if not isinstance(model, models.BPE) or model.dropout:
            return None
        try:
            normalizers = _steps(backend.normalizer, "normalizers")
            pre_tokenizers = _steps(backend.pre_tokenizer, "pretokenizers")
            post_processors = _steps(backend.post_processor, "processors")
            kinds = {step["type"] for step in normalizers}
            around = _around(post_processors)
            if (
                not kinds <= _NORMALIZERS
                or not _cutting(pre_tokenizers)
                or not _added_tokens_stay_whole(backend)
                or around is None
            ):
                return None
        except Exception:  # a step written in Python, or damaged; the library raises bare Exception
            return None
        places = [_SPACE]
        if not any(step.get("add_prefix_space") for step in pre_tokenizers):
            places += [_NEWLINE, _CHINESE] if kinds <= _LEAVE_CHINESE_ALONE else [_NEWLINE]
        return cls(re.compile(rf"(?s:.*)(?:{'|'.join(places)})"), *around)

    def last(self, text: str, start: int, end: int) -> int | None:
        """The last place to cut `text` at that looks at nothing outside `[start - 1, end)`."""
        match = self.place.match(text, start, end)
        return None if match is None else match.end() - 1


def longest_token(backend: tokenizers.Tokenizer) -> int | None:
    """The most bytes of a text that one token can stand for; None where that is not known.

    It is of a byte-level BPE that has all bytes, and whose steps drop no text.
    """
    model = backend.model
    if not isinstance(model, models.BPE) or backend.normalizer is not None:
        return None
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    try:
        steps = _steps(backend.pre_tokenizer, "pretokenizers")
        vocabulary = backend.get_vocab(with_added_tokens=False)
        added = list(backend.get_added_tokens_decoder().values())
    except Exception:  # a step written in Python, or damaged; the library raises bare Exception
        return None
    kinds = {step["type"] for step in steps}
    drops = any(step.get("behavior") == "Removed" for step in steps)
    strips = any(token.lstrip or token.rstrip for token in added)
    if "ByteLevel" not in kinds or not kinds <= {"ByteLevel", "Split", "Digits"} or drops or strips:
        return None
    if not vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet()):
        return None
    # A character of a token in the vocabulary is a byte.
    return max(*map(len, vocabulary), *(len(token.content.encode()) for token in added), 1)


def _steps(component: Any, members: str) -> list[dict[str, Any]]:  # noqa: ANN401
    """A part of the pipeline as its steps in order, each as in tokenizer.json."""
    if component is None:
        return []
    found, waiting = [], [json.loads(component.__getstate__())]
    while waiting:
        step = waiting.pop()
        if step["type"] == "Sequence":
            waiting += reversed(step[members])
        else:
            found.append(step)
    return found


def _cutting(pre_tokenizers: list[dict[str, Any]]) -> bool:
    """Whether all steps respect the cut, and one of them makes it a boundary."""
    makes_boundary = False
    for step in pre_tokenizers:
        match step["type"]:
            case "Digits":
                alternatives = set()
            case "ByteLevel":
                alternatives = set(_GPT2.split("|")) if step["use_regex"] else set()
            case "Split":
                alternatives = _split_alternatives(step)
            case _:
                return False
        if not alternatives <= _UNDERSTOOD:
            return False
        makes_boundary |= bool(alternatives & _WORDS) and r"\s+" in alternatives
    return makes_boundary


def _split_alternatives(step: Mapping[str, Any]) -> set[str]:
    """What a `Split` step matches, or something not understood."""
    pattern = step["pattern"].get("Regex", "not a regex")
    alternatives = _ALTERNATIVE.findall(pattern)
    # Both keep matches as pieces: the second is how conversions of tiktoken's files put it.
    keeps_matches = (step["behavior"], step["invert"]) in {("Isolated", False), ("Removed", True)}
    return set(alternatives) if keeps_matches and "|".join(alternatives) == pattern else {pattern}


def _added_tokens_stay_whole(backend: tokenizers.Tokenizer) -> bool:
    for token in backend.get_added_tokens_decoder().values():
        spellings = [token.content]
        if token.normalized and backend.normalizer is not None:
            spellings.append(backend.normalizer.normalize_str(token.content))
        if any(_BREAKS.search(spelling) for spelling in spellings):
            return False
        # It would take the whitespace after it along; a normalized x might end as it does.
        if token.rstrip and (len(spellings) > 1 or re.search(r"\w$", token.content)):
            return False
    return True


def _around(post_processors: list[dict[str, Any]]) -> tuple[TokenIds, TokenIds] | None:
    """The ids put before and after; None where that is not all that is done."""
    # ByteLevel changes offsets only. A second template fails in the library.
    steps = [step for step in post_processors if step["type"] != "ByteLevel"]
    if not steps:
        return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32)
    if len(steps) > 1 or steps[0]["type"] != "TemplateProcessing":
        return None
    before: list[int] = []
    after: list[int] = []
    num_texts = 0
    for piece in steps[0]["single"]:
        if "Sequence" in piece:
            num_texts += 1
        else:
            ids = steps[0]["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
            (after if num_texts else before).extend(ids)
    if num_texts != 1:
        return None
    return np.array(before, dtype=np.int32), np.array(after, dtype=np.int32)
