"""Segments: joined they are the texts, with shared starts once; tokens are the whole texts'."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_families import FAMILIES, PIECES, template

from batchllm.text import ragged, segments
from batchllm.text.cuts import Cuts
from batchllm.text.segments import segment
from batchllm.text.tokenizer import Tokenizer

# Few pieces and short texts, so that many start alike.
ALIKE = st.lists(
    st.lists(st.sampled_from(["a", "b", "aa", " ", "\n", "'s", "é", "\u0301"]), max_size=8).map(
        "".join
    ),
    max_size=12,
)
TREES = st.recursive(
    st.lists(st.sampled_from(PIECES), max_size=6).map(lambda pieces: ["".join(pieces)]),
    lambda below: st.builds(
        lambda head, parts: [head + text for part in parts for text in part],
        st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
        st.lists(below, min_size=1, max_size=3),
    ),
    max_leaves=10,
)


@pytest.fixture(autouse=True)
def shortest_segments(monkeypatch):
    monkeypatch.setattr(segments, "_MIN_CHARS", 1)


def tokenizer_of(name, post_processor=None):
    backend = FAMILIES[name].from_str(FAMILIES[name].to_str())
    if post_processor is not None:
        backend.post_processor = post_processor
    return Tokenizer(backend, bos_token=None, eos_token=None, eos_token_ids=(), chat_template=None)


TOKENIZERS = {name: tokenizer_of(name) for name in FAMILIES} | {
    "around": tokenizer_of("gpt2", template("<s> $A </s>", ("<s>", 7), ("</s>", 8))),
    "not cut": tokenizer_of("gpt2", template("$A $A")),
}


def assert_equal(tokens, expected):
    np.testing.assert_array_equal(tokens.values, expected.values)
    np.testing.assert_array_equal(tokens.offsets, expected.offsets)
    assert tokens.values.dtype == np.int32


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=50)
@given(texts=TREES | ALIKE, special=st.booleans(), shuffle=st.randoms())
def test_tokens_are_the_whole_texts(name, texts, special, shuffle):
    shuffle.shuffle(texts)
    tokenizer = TOKENIZERS[name]
    expected = tokenizer.encode_batch_whole(texts, add_special_tokens=special)
    assert_equal(tokenizer.encode_batch(texts, add_special_tokens=special), expected)


def cuts():
    return Cuts.of(FAMILIES["gpt2"])


def once(texts, at):
    """By definition: the parts that texts fall into, cut where two of them part, each once."""

    def common(a, b):
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                    min(len(a), len(b)))  # fmt: skip

    parts = set()
    for i, text in enumerate(texts):
        ends = {at.last(text, 0, common(text, other)) for j, other in enumerate(texts) if j != i}
        ends = [0, *sorted(ends - {None}), len(text)]
        parts |= {text[a:b] for a, b in pairwise(ends)}
    return parts


@given(texts=TREES | ALIKE)
def test_segments_are_cut_where_texts_part(texts):
    found = segment(texts, cuts())
    if found is None:
        assert len({text[:1] for text in texts}) == len(texts)
        return
    assert ["".join(found.segments[n] for n in run) for run in found.runs] == texts
    assert len(set(found.segments)) == len(found.segments)
    assert set(found.segments) == once(texts, cuts())


def test_three_levels():
    texts = ["sys doc1 q1", "sys doc2 q1", "sys doc1 q2", "other", "sys doc1 q1"]
    found = segment(texts, cuts())
    assert [[found.segments[n] for n in run] for run in found.runs] == [
        ["sys", " doc1", " q1"],
        ["sys", " doc2 q1"],
        ["sys", " doc1", " q2"],
        ["other"],
        ["sys", " doc1", " q1"],
    ]


def test_texts_with_nothing_in_common_are_left_alone():
    assert segment(["a b", "b c", "c d"], cuts()) is None
    assert segment([], cuts()) is None


def test_segments_are_not_too_short(monkeypatch):
    monkeypatch.setattr(segments, "_MIN_CHARS", 8)
    texts = ["one two three four", "one two three five", "one two six", "one seven"]
    found = segment(texts, cuts())
    assert found.segments == ["one seven", "one two six", "one two three", " five", " four"]


def test_a_shared_start_goes_to_the_backend_once(monkeypatch):
    tokenizer, seen = tokenizer_of("gpt2"), []
    whole = tokenizer.encode_batch_whole

    def watched(texts, *, add_special_tokens):
        seen.extend(texts)
        return whole(texts, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode_batch_whole", watched)
    head = "word " * 100
    tokenizer.encode_batch([f"{head}{i}" for i in range(50)], add_special_tokens=True)
    assert sum(map(len, seen)) < len(head) + 50 * 4


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_rows_taken_in_blocks(monkeypatch, block):
    monkeypatch.setattr(ragged, "_BLOCK_TOKENS", block)
    generator = random.Random(0)
    rows = [[generator.randrange(9)] * generator.randrange(5) for _ in range(20)]
    wanted = [generator.randrange(20) for _ in range(50)]
    tokens = ragged.RaggedTokens.from_sequences(rows)
    taken = ragged.take_rows(tokens, np.array(wanted, dtype=np.int64))
    assert [row.tolist() for row in taken] == [rows[i] for i in wanted]
