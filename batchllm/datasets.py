"""Hugging Face `datasets`: `generate(dataset)`, a map over all rows at once, on disk and cached.

Only the columns that prompts are made of are read, and only the answers are written: the input's
columns stay in the files they are in, whatever features they have.

The splits of a `DatasetDict` are answered as one table, since they mostly share their prompts'
beginnings; so a row's number, which its random draws go by, counts through the splits.
"""

from itertools import accumulate, pairwise
from typing import Any, TypeVar

import pyarrow as pa

from batchllm import __version__
from batchllm.errors import UsageError

try:
    import datasets as hf
    from datasets.fingerprint import Hasher
except ImportError as error:
    raise UsageError("batchllm.datasets needs it: pip install 'batchllm[datasets]'") from error

from batchllm.integrations.call import GenerateCall
from batchllm.integrations.summary import Summary
from batchllm.integrations.whole import answer_table

__all__ = ["Summary", "generate"]

Splits = TypeVar("Splits", hf.Dataset, hf.DatasetDict)


def generate(dataset: Splits, *, summary: Summary | None = None, **options: Any) -> Splits:
    """Answer every row of a dataset, or of all its splits together.

    Args:
        dataset: with all its rows at hand.
        summary: is told what it took; where the answers were cached, it stays empty.
        **options: see `GenerateCall.of_options`.

    Returns:
        The dataset with the answer columns behind its own. Its fingerprint follows from the
        input's and the options.

    Raises:
        BatchLLMError: an option makes no sense, the columns do not fit, or the model cannot be
            loaded or run. A bad row is an answer with an error.
    """
    call = GenerateCall.of_options(**options)
    if summary is not None:
        summary.clear()
    if isinstance(dataset, hf.DatasetDict):
        splits = list(dataset.values())
        answered = _answer_splits(splits, call, summary)
        return hf.DatasetDict(dict(zip(dataset, answered, strict=True)))
    if isinstance(dataset, hf.Dataset):
        return _answer_splits([dataset], call, summary)[0]
    raise UsageError(
        f"generate takes a Dataset or a DatasetDict, not {type(dataset).__name__}: all rows are "
        "planned together; make one of a stream with Dataset.from_generator, or load it without "
        "streaming=True"
    )


def _answer_splits(
    splits: list[hf.Dataset], call: GenerateCall, summary: Summary | None
) -> list[hf.Dataset]:
    """The splits with their answers; row numbers go on from one to the next."""
    schemas = [split.features.arrow_schema for split in splits]
    added = [call.check(schema).schema for schema in schemas]
    if not splits:
        return []
    # Without a column there would be no rows, and a template may well use none.
    names = list(call.spec.columns_of(schemas[0])) or schemas[0].names[:1]
    if any(one != added[0] for one in added) or not all(
        set(names) <= set(s.names) for s in schemas
    ):
        raise UsageError("the splits have different columns; generate for each by itself")
    try:
        prompts = hf.concatenate_datasets([split.select_columns(names) for split in splits])
    except ValueError as error:
        raise UsageError(f"the splits' prompt columns are of different types: {error}") from error
    answers = _answers(prompts, added[0], call, summary)
    ends = list(accumulate(map(len, splits), initial=0))
    return [
        _beside(split, answers.select(range(begin, end)))
        for split, (begin, end) in zip(splits, pairwise(ends), strict=True)
    ]


def _answers(
    prompts: hf.Dataset, added: pa.Schema, call: GenerateCall, summary: Summary | None
) -> hf.Dataset:
    """The answer columns as a dataset of their own, from the cache if they are there."""

    def answer(table: pa.Table) -> pa.Table:
        return answer_table(table, call, summary).rename_columns(added.names)

    if len(prompts) == 0:
        return hf.Dataset(added.empty_table())
    asked = Hasher.hash((prompts._fingerprint, repr(call), __version__))
    answers = prompts.with_format("arrow").map(
        answer,
        batched=True,
        batch_size=None,
        remove_columns=prompts.column_names,
        features=hf.Features.from_arrow_schema(added),
        new_fingerprint=asked,
        desc="Answering",
    )
    return answers.with_format(None)


def _beside(split: hf.Dataset, answers: hf.Dataset) -> hf.Dataset:
    """Both datasets' columns, in the first one's format."""
    shown = split.format
    if len(split):
        both = hf.concatenate_datasets(
            [split.with_format(None), answers], axis=1, split=split.split
        )
    else:  # an empty dataset is left out of a concatenation
        both = split.with_format(None)
        for name, feature in answers.features.items():
            both = both.add_column(name, [], feature=feature)
    hidden = set(split.column_names) - set(shown["columns"])
    return both.with_format(
        shown["type"],
        columns=[name for name in both.column_names if name not in hidden] if hidden else None,
        output_all_columns=shown["output_all_columns"],
        **shown["format_kwargs"],
    )
