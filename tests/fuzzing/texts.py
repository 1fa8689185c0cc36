"""Random texts as rows, and what rows may come to."""

import pyarrow as pa

from fuzzing.mutate import TEXTS


def random_texts(rng, count=6):
    return ["".join(rng.choices(TEXTS, k=rng.randint(1, 4))) for _ in range(count)]


def table_of(texts):
    """A column `t`; Arrow has no lone surrogates."""
    return pa.table({"t": [t.encode("utf-8", "replace").decode() for t in texts]})


def check_rows(batch):
    """Each row has tokens, or an error that says something."""
    assert len(batch.tokens) == len(batch.tokens.offsets) - 1
    for row, error in batch.errors.items():
        assert error.code.isidentifier()
        assert error.message and len(error.message) <= 1000, error
        assert not len(batch.tokens[row])
    for row in range(len(batch.tokens)):
        assert row in batch.errors or len(batch.tokens[row])
