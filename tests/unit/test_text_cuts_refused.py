"""Cuts: a tokenizer with a part that is not understood is not cut."""

import numpy as np
import pytest
import tokenizers
from tokenizer_families import FAMILIES, LLAMA3, byte_level_backend, encode, split, template
from tokenizers import AddedToken, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

from batchllm.text.cuts import Cuts


def changed(backend=None, **parts):
    backend = byte_level_backend(use_regex=True) if backend is None else backend
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def sentencepiece():
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4}
    return tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>"))


def wordpiece():
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre.BertPreTokenizer()
    return backend


def with_dropout():
    model = models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.5)
    return changed(tokenizers.Tokenizer(model), pre_tokenizer=pre.ByteLevel())


class Halves:
    def pre_tokenize(self, text):
        text.split(lambda i, s: [s[: len(s.normalized) // 2], s[len(s.normalized) // 2 :]])


class Title:
    def normalize(self, text):
        text.map(str.title)


REFUSED = {
    "metaspace": lambda: changed(sentencepiece(), pre_tokenizer=pre.Metaspace()),
    "no pre-tokenizer": lambda: changed(sentencepiece(), normalizer=normalizers.Prepend("▁")),
    "bytes without a pattern": byte_level_backend,
    "words alone": lambda: byte_level_backend(split(r" ?\p{L}+")),
    "whitespace alone": lambda: byte_level_backend(split(r"\s+")),
    "one pattern unknown": lambda: byte_level_backend(split(r"\s+$"), use_regex=True),
    "one alternative unknown": lambda: byte_level_backend(split(LLAMA3 + r"|\p{L}+ \p{L}+")),
    "a group left open": lambda: byte_level_backend(split(rf"(?:{LLAMA3})")),
    "a split that joins": lambda: byte_level_backend(split(LLAMA3, "merged_with_next")),
    "a split that removes": lambda: byte_level_backend(split(LLAMA3, "removed")),
    "split at a string": lambda: byte_level_backend(pre.Split(" ", "isolated"), use_regex=True),
    "punctuation": lambda: byte_level_backend(pre.Punctuation(), use_regex=True),
    "bert": wordpiece,
    "wordpiece over bytes": lambda: changed(
        wordpiece(), normalizer=None, pre_tokenizer=pre.ByteLevel()
    ),
    "dropout": with_dropout,
    "strip": lambda: changed(normalizer=normalizers.Strip()),
    "strip after NFC": lambda: changed(
        normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    ),
    "a pre-tokenizer in Python": lambda: changed(pre_tokenizer=pre.PreTokenizer.custom(Halves())),
    "a normalizer in Python": lambda: changed(normalizer=normalizers.Normalizer.custom(Title())),
    "roberta": lambda: changed(post_processor=processors.RobertaProcessing(("a", 1), ("b", 2))),
    "two templates": lambda: changed(
        post_processor=processors.Sequence([template("$A"), template("$A")])
    ),
    "text twice": lambda: changed(post_processor=template("$A $A")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_not_understood(name):
    assert Cuts.of(REFUSED[name]()) is None


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (AddedToken("a b", normalized=False), "xa bx"),
        (AddedToken(" ", normalized=False, single_word=True), "a ."),
        (AddedToken(" b", normalized=False, single_word=True), "a b"),
        (AddedToken("a\n", normalized=False), "xa\nb"),
        (AddedToken("字。", normalized=False), "漢字。"),
        (AddedToken("。b", normalized=False, single_word=True), "漢。b"),
        (AddedToken("\u00a0b", normalized=True, single_word=True), "a b"),
        (AddedToken("ab", normalized=False, rstrip=True), "ab c"),
        (AddedToken(")", normalized=True, rstrip=True), "⑴ c"),
    ],
)
def test_added_tokens_across_a_cut(token, text):
    backend = byte_level_backend(split(LLAMA3), normalizer=normalizers.NFKC(), added=[token])
    assert Cuts.of(backend) is None
    # The rule is not idle: cut there, this text has other tokens.
    place = next(i for i, c in enumerate(text) if c in " \n。")
    whole = encode(backend, text)
    assert whole != encode(backend, text[:place]) + encode(backend, text[place:]), text


@pytest.mark.parametrize(
    ("post_processor", "before", "after"),
    [
        (None, [], []),
        (processors.ByteLevel(), [], []),
        (template("<s> $A </s>", ("<s>", 7), ("</s>", 8)), [7], [8]),
        (template("$0"), [], []),
        (template("<s> <s> $A:1", ("<s>", 7)), [7, 7], []),
        (
            processors.Sequence(
                [
                    processors.ByteLevel(),
                    template("x $A y", ("x", 1), ("y", 2)),
                ]
            ),
            [1],
            [2],
        ),
    ],
)
def test_what_goes_around(post_processor, before, after):
    backend = changed()
    if post_processor is not None:
        backend.post_processor = post_processor
    cuts = Cuts.of(backend)
    assert (cuts.before.tolist(), cuts.after.tolist()) == (before, after)
    assert cuts.before.dtype == cuts.after.dtype == np.int32
    assert backend.encode("a b").ids == before + encode(backend, "a b") + after


def test_a_template_of_many_ids_a_token():
    special = {"id": "<s>", "ids": [5, 6], "tokens": ["x", "y"]}
    backend = changed(
        post_processor=processors.TemplateProcessing(single="<s> $A", special_tokens=[special])
    )
    assert Cuts.of(backend).before.tolist() == [5, 6]
    assert backend.encode("").ids == [5, 6]


def test_all_families_are_cut():
    assert all(Cuts.of(backend) is not None for backend in FAMILIES.values())
