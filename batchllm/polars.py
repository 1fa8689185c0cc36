"""Polars: `frame.batchllm.generate(…)`, on a `DataFrame` and on a `LazyFrame`.

Importing this module adds the namespace. A frame is answered in this process; its own columns are
not touched, so whatever types Polars has go through.
"""

from functools import partial
from typing import Any

try:
    import polars as pl
except ImportError as error:
    from batchllm.errors import UsageError

    raise UsageError("batchllm.polars needs Polars: pip install 'batchllm[polars]'") from error

from batchllm.integrations.call import GenerateCall
from batchllm.integrations.summary import Summary
from batchllm.integrations.whole import answer_table

__all__ = ["DataFrameNamespace", "LazyFrameNamespace", "Summary"]


@pl.api.register_dataframe_namespace("batchllm")
class DataFrameNamespace:
    """What `DataFrame.batchllm` is."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self._frame = frame

    def generate(self, *, summary: Summary | None = None, **options: Any) -> pl.DataFrame:
        """Answer every row.

        Args:
            summary: is told what it took.
            **options: see `GenerateCall.of_options`.

        Returns:
            The frame with the answer columns behind its own.

        Raises:
            BatchLLMError: an option makes no sense, or the model cannot be loaded or run. A bad
                row is an answer with an error.
        """
        return _answer(self._frame, GenerateCall.of_options(**options), summary)


@pl.api.register_lazyframe_namespace("batchllm")
class LazyFrameNamespace:
    """What `LazyFrame.batchllm` is."""

    def __init__(self, frame: pl.LazyFrame) -> None:
        self._frame = frame

    def generate(self, *, summary: Summary | None = None, **options: Any) -> pl.LazyFrame:
        """Answer every row when the frame is collected, each time it is.

        All rows are planned together, so this step is not streamed, and what comes after it (a
        filter, a choice of columns or rows) does not move in front of it.

        Args:
            summary: is told what it took, whenever it ran.
            **options: see `GenerateCall.of_options`.

        Raises:
            UsageError: an option makes no sense, or the columns do not fit. What can go wrong
                later, `collect` raises.
        """
        call = GenerateCall.of_options(**options)
        schema = self._frame.collect_schema()
        added = call.check(pl.DataFrame(schema=schema).to_arrow().schema).schema
        answers = pl.DataFrame(pl.from_arrow(added.empty_table())).schema
        return self._frame.map_batches(
            partial(_answer, call=call, summary=summary), schema=pl.Schema({**schema, **answers})
        )


def _answer(frame: pl.DataFrame, call: GenerateCall, summary: Summary | None) -> pl.DataFrame:
    answers = pl.from_arrow(answer_table(frame.to_arrow(), call, summary))
    assert isinstance(answers, pl.DataFrame)
    return frame.hstack(answers)
