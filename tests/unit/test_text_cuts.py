"""Cuts: at every place where a tokenizer may be cut, the tokens are those of the two parts."""

# ruff: noqa: RUF001
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_families import FAMILIES, PIECES, encode

from batchllm.text.cuts import Cuts

TEXTS = st.lists(st.sampled_from(PIECES), max_size=16).map("".join)


def places(cuts, text):
    return {p for end in range(len(text) + 1) if (p := cuts.last(text, 0, end)) is not None}


@pytest.mark.parametrize("name", FAMILIES)
@given(text=TEXTS)
def test_tokens_are_those_of_the_parts(name, text):
    backend = FAMILIES[name]
    whole = encode(backend, text)
    for place in places(Cuts.of(backend), text):
        assert whole == encode(backend, text[:place]) + encode(backend, text[place:])


@pytest.mark.parametrize("name", FAMILIES)
def test_where_cuts_are(name):
    cuts = Cuts.of(FAMILIES[name])
    assert places(cuts, "one two, three 4 five") == {3, 14, 16}
    assert places(cuts, "ab1\ncd \nef\n漢字\n") == ({6} if "prefix-space" in name else {3, 6, 10})
    changed = any(part in name for part in ("prefix-space", "NFD", "NFK"))
    assert places(cuts, "漢字。がー，x，") == (set() if changed else {2, 5})


def test_last_place_before_an_end():
    cuts = Cuts.of(FAMILIES["gpt2"])
    text = "one two three"
    assert [cuts.last(text, 0, end) for end in (3, 4, 7, 8, 13)] == [None, 3, 3, 7, 7]
    assert cuts.last(text, 4, 7) is None


def test_neither_end_nor_what_follows_is_looked_at():
    cuts = Cuts.of(FAMILIES["llama3"])
    assert all(cuts.last("one " + rest, 0, 4) == 3 for rest in ("", " ", "x", "\u0301", "\n"))
