"""What the builders of text workloads have in common: a table of rows, and what it can share.

The unit is the character: what is saved is exact for any tokenizer that keeps prefixes, and close
for the others.
"""

import jinja2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def table_of(rows: list[tuple[str | int, ...]], schema: pa.Schema) -> pa.Table:
    """The table of `rows`, each with one value for every field of `schema`."""
    columns = zip(*rows, strict=True)
    arrays = [pa.array(c, field.type) for c, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def shuffle(table: pa.Table, seed: int) -> pa.Table:
    """The rows of `table` in a random order that only `seed` decides."""
    return table.take(pa.array(np.random.default_rng(seed).permutation(len(table))))


def render(table: pa.Table, template: str) -> list[str]:
    """Each row's prompt, as `batchllm run --template` makes it."""
    compiled = jinja2.Template(template, undefined=jinja2.StrictUndefined)
    return [compiled.render(row) for row in table.to_pylist()]


def count_distinct_prefixes(prompts: list[str]) -> int:
    """Counts the characters left when each shared prefix is kept once.

    In sorted order a prompt adds what goes beyond its common prefix with the prompt before it.
    Strings sort by code point, which is also how their UTF-8 bytes sort.
    """
    total = 0
    before = code_points("")
    for prompt in sorted(prompts):
        points = code_points(prompt)
        length = min(len(points), len(before))
        differs = points[:length] != before[:length]
        first = int(differs.argmax()) if length else 0
        common = first if length and differs[first] else length
        total += len(points) - common
        before = points
    return total


def code_points(text: str) -> NDArray[np.uint32]:
    """A string's characters as numbers."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def saved(prompts: list[str]) -> float:
    """The share of all characters that keeping each shared prefix once saves, 0 to 1."""
    return 1 - count_distinct_prefixes(prompts) / max(1, sum(map(len, prompts)))


def describe(table: pa.Table, template: str) -> str:
    """States a workload's size in one line; `template` makes the prompts."""
    prompts = render(table, template)
    total = sum(map(len, prompts))
    shared = count_distinct_prefixes(prompts)
    output = int(np.sum(table["max_tokens"].to_numpy()))
    return (
        f"{len(prompts):,} rows, {total:,} prompt characters, {shared:,} after sharing "
        f"({1 - shared / max(1, total):.1%} saved), at most {output:,} output tokens"
    )
