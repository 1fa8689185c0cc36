"""Tokenizers of the families that can be cut, over one vocabulary in which a wrong cut shows.

It is trained on text that nothing splits, so it has merges across any place there is, and where a
pre-tokenizer makes no boundary, cut text gets other tokens.
"""

# ruff: noqa: RUF001
import random
from functools import cache

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"

# Letters that normalizers take apart or join, marks, every kind of whitespace, what patterns treat
# specially, and spellings of added tokens, whole and in part.
PIECES = [
    *("a", "b", "Z", "ab", "word", " ", " ", " ", "  ", "\n", "\n", "\n\n", "\r", "\t", "/", "_"),
    *("'s", "'S", "'r", "e", "'", ".", ",", ",b", '"', "-", "1", "12", "½", "²", "⒈", "Ⅻ", "٣"),
    *("é", "e\u0301", "\u0301", "\u0338", "\u0958", "\ufb1d", "İ", "ﬁ", "ſ", "\ufc5e", "ß", "ŉ"),
    *("漢", "字", "か", "が", "ー", "\u3099", "。", "，", "！", "、", "\u3000", "\uff9e", "한"),
    *("\u00a0", "\u2003", "\u2028", "\u200b", "\x85", "\x1c", "\x00", "😀", "👨‍👩", "क्षे", "ไทย"),
    *("<l>", "<r>", "<n>", "<", ">", "l>", "<l", "solo", "Solo"),
]

ADDED = [
    AddedToken("<l>", lstrip=True, normalized=False),
    AddedToken("<r>", rstrip=True, normalized=False),
    AddedToken("<n>", normalized=True),
    AddedToken("solo", single_word=True, normalized=True),
    AddedToken("b", single_word=True, lstrip=True, normalized=False),
    AddedToken(",b", normalized=True, single_word=True),
]


@cache
def trained_vocabulary():
    """Byte-level merges across letters, spaces, line ends, marks: whatever stands side by side."""
    generator = random.Random(0)
    texts = ["".join(generator.choices(PIECES, k=60)) for _ in range(300)]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1200, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


def byte_level_backend(*steps, normalizer=None, added=(), prefix_space=False, use_regex=False):
    """A BPE over bytes that splits text by `steps`, then perhaps by GPT-2's pattern."""
    backend = tokenizers.Tokenizer.from_str(trained_vocabulary())
    backend.normalizer = normalizer
    last = pre.ByteLevel(add_prefix_space=prefix_space, use_regex=use_regex)
    backend.pre_tokenizer = pre.Sequence([*steps, last]) if steps else last
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added))
    return backend


def split(pattern, behavior="isolated", *, invert=False):
    return pre.Split(Regex(pattern), behavior=behavior, invert=invert)


def template(single, *special):
    return processors.TemplateProcessing(single=single, special_tokens=list(special))


def families():
    make = byte_level_backend
    yield "gpt2", make(use_regex=True)
    yield "gpt2-prefix-space", make(use_regex=True, prefix_space=True)
    yield "gpt2-added", make(use_regex=True, added=ADDED)
    yield "gpt2-prefix-space-added", make(use_regex=True, prefix_space=True, added=ADDED)
    yield "smollm2", make(pre.Digits(individual_digits=True), use_regex=True)
    yield "digits-together", make(pre.Digits(individual_digits=False), use_regex=True)
    yield "llama3", make(split(LLAMA3))
    yield "llama3-added", make(split(LLAMA3), added=ADDED)
    yield "tiktoken", make(split(LLAMA3, "removed", invert=True))
    yield "qwen2", make(split(QWEN2), normalizer=normalizers.NFC(), added=ADDED)
    yield "o200k", make(split(O200K), added=ADDED)
    gguf = [PUNCTUATION, GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]
    yield "gguf-default", make(*map(split, gguf), added=ADDED)
    for name in ("NFD", "NFKC", "NFKD", "Lowercase"):
        normalizer = getattr(normalizers, name)()
        yield f"llama3-{name}", make(split(LLAMA3), normalizer=normalizer, added=ADDED)
    both = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    yield "o200k-NFKD-Lowercase", make(split(O200K), normalizer=both, added=ADDED)


FAMILIES = dict(families())


def encode(backend, text):
    return backend.encode(text, add_special_tokens=False).ids
