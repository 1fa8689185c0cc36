r"""What tokenizing shared starts once saves: texts by segments against the same texts whole.

Both go through the default model's tokenizer in one process, alternating; seconds are the
process's CPU time, and the ratio is the median of the rounds'. Tables come from `datasets/`, each
with the template that makes its texts; `classify` and `unshared` are made here.

    .venv/bin/python scripts/bench_tokenize.py classify unshared \
        documents.parquet '{{ doc_head }}\n\n{{ chapter_text }}\n\n{{ question }}'
"""

import random
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq

from batchllm.models import locate
from batchllm.models.checkpoint import open_checkpoint
from batchllm.text.template import RowTemplate
from batchllm.text.tokenizer import Tokenizer

ROUNDS = 3
SYLLABLES = ("ka", "lo", "mi", "ter", "an", "so", "ve", "ra", "in", "do")


def _words(count: int, rng: random.Random) -> str:
    return " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(count))


def _made(name: str) -> list[str]:
    """20,000 short rows, below one long instruction or with nothing in common."""
    rng = random.Random(0)
    head = {"classify": _words(190, rng) + "\n\n", "unshared": ""}[name]
    return [head + _words(8, rng) for _ in range(20_000)]


def _cases(arguments: list[str]) -> Iterator[tuple[str, list[str]]]:
    for argument, following in pairwise([*arguments, ""]):
        if argument.endswith(".parquet"):
            template = RowTemplate(following.encode().decode("unicode_escape"))
            yield argument, [template.render(row) for row in pq.read_table(argument).to_pylist()]
        elif "{{" not in argument:
            yield argument, _made(argument)


def _measure(tokenizer: Tokenizer, texts: list[str]) -> str:
    whole, cut = [], []
    for _ in range(ROUNDS):
        start = time.process_time()
        expected = tokenizer.encode_batch_whole(texts, add_special_tokens=True)
        middle = time.process_time()
        found = tokenizer.encode_batch(texts, add_special_tokens=True)
        whole.append(middle - start)
        cut.append(time.process_time() - middle)
    assert np.array_equal(found.values, expected.values)
    assert np.array_equal(found.offsets, expected.offsets)
    ratio = statistics.median(b / a for a, b in zip(whole, cut, strict=True))
    return (
        f"{len(texts):,} | {len(found.values) / 1e6:.2f} | {statistics.median(whole):.2f} "
        f"| {statistics.median(cut):.2f} | {ratio:.2f}"
    )


def main() -> None:
    """Measure what the command line names."""
    tokenizer = open_checkpoint(locate.resolve(None)).tokenizer()
    tokenizer.encode_batch(["a text", "a text"], add_special_tokens=True)
    print("| texts | rows | Mtokens | whole s | by segments s | ratio |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, texts in _cases(sys.argv[1:]):
        print(f"| {name} | {_measure(tokenizer, texts)} |", flush=True)


if __name__ == "__main__":
    main()
