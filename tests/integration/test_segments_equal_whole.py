"""The default model's tokenizer: tokenized by segments, texts get the tokens of the whole."""

import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from batchllm.models import locate
from batchllm.models.checkpoint import open_checkpoint
from batchllm.text import segments
from batchllm.text.chat import ChatTemplate

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "datasets" / "example.parquet"


@pytest.fixture(scope="module")
def tokenizer():
    return open_checkpoint(locate.resolve(None)).tokenizer()


def example_texts(tokenizer):
    """The example's rows as conversations, each column once in front of the others."""
    chat = ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)
    rows = pq.read_table(EXAMPLE).to_pylist()
    texts = []
    for first in rows[0]:
        for row in rows:
            cells = [row[first], *(value for name, value in row.items() if name != first)]
            content = "\n\n".join(str(cell) for cell in cells)
            texts.append(chat.render([{"role": "user", "content": content}]))
    return texts


def generated_texts(_tokenizer):
    """Documents out of few pieces, in which chapters and sections are nested, and cut anywhere."""
    generator = random.Random(0)
    pieces = ["a", "the", " the", " ", " ", "\n", "\n\n", "12", " 3", "don't", "é", "e\u0301", "½"]
    pieces += ["日本", "。", "か", "😀", "\u00a0", "\u3000", "<|im_end|>", "<|im_", ".", ", ", "\t"]

    def piece(length):
        return "".join(generator.choices(pieces, k=generator.randrange(1, length)))

    texts = []
    for _ in range(20):
        document = piece(400)
        for _ in range(5):
            chapter = document[: generator.randrange(len(document) + 1)] + piece(100)
            texts += [chapter + piece(60) for _ in range(10)]
    generator.shuffle(texts)
    return texts


@pytest.mark.parametrize("least", [1, 64])
@pytest.mark.parametrize("make", [example_texts, generated_texts])
@pytest.mark.parametrize("special", [True, False])
def test_segments_equal_whole(monkeypatch, tokenizer, make, special, least):
    monkeypatch.setattr(segments, "_MIN_CHARS", least)
    texts = make(tokenizer)
    found = tokenizer.encode_batch(texts, add_special_tokens=special)
    whole = tokenizer.encode_batch_whole(texts, add_special_tokens=special)
    np.testing.assert_array_equal(found.values, whole.values)
    np.testing.assert_array_equal(found.offsets, whole.offsets)


def test_the_example_is_mostly_shared(tokenizer):
    texts = example_texts(tokenizer)
    found = segments.segment(texts, tokenizer._cuts)
    assert sum(map(len, found.segments)) < sum(map(len, texts)) / 2
