"""The columns an answer adds to a row."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from batchllm.errors import UsageError
from batchllm.request import RequestOutput

_FACTS = {
    "finish_reason": pa.string(),
    "prompt_tokens": pa.int32(),
    "cached_tokens": pa.int32(),
    "output_tokens": pa.int32(),
    "error": pa.string(),
}


@dataclass(frozen=True, slots=True)
class AnswerColumns:
    """Names of the answer column and of the columns of facts about it.

    Where the input has a column of a fact's name (it may be the output of another run), all facts
    carry the answer column's name in front.
    """

    answer: str
    prefix: str

    @classmethod
    def choose(cls, schema: pa.Schema, output_column: str) -> "AnswerColumns":
        """Pick names that the input does not use.

        Raises:
            UsageError: there are none.
        """
        taken = set(schema.names)
        if output_column in taken:
            raise UsageError(
                f"the input has a column {output_column!r}; choose another with --output-column"
            )
        if output_column in _FACTS:
            raise UsageError(f"{output_column!r} is the name of a column batchllm adds itself")
        for prefix in ("", f"{output_column}_"):
            if not any(prefix + name in taken for name in _FACTS):
                return cls(output_column, prefix)
        raise UsageError(
            f"the input has columns {output_column}_… of an earlier run; "
            "choose another --output-column"
        )

    @property
    def schema(self) -> pa.Schema:
        """The columns that answers add."""
        facts = [pa.field(self.prefix + name, kind) for name, kind in _FACTS.items()]
        return pa.schema([pa.field(self.answer, pa.string()), *facts])

    @classmethod
    def of_output(cls, names: Sequence[str], output_column: str) -> "AnswerColumns":
        """Those that an output with these columns has: they are the last."""
        is_plain = list(names[-len(_FACTS) :]) == list(_FACTS)
        return cls(output_column, "" if is_plain else f"{output_column}_")

    @property
    def error(self) -> str:
        """The column that says why a row has no answer."""
        return f"{self.prefix}error"

    @property
    def finish_reason(self) -> str:
        """The column that says how an answer ended."""
        return f"{self.prefix}finish_reason"

    def counters(self, table: pa.Table) -> dict[str, int]:
        """What can be counted from answers alone, by the names that `Metrics` has for it."""
        fine = table.filter(pc.is_null(table[self.error]))
        sums = {
            name: int(pc.sum(fine[self.prefix + name]).as_py() or 0)
            for name in ("prompt_tokens", "cached_tokens", "output_tokens")
        }
        return {
            "rows": table.num_rows,
            "failed": table.num_rows - fine.num_rows,
            "prompt_tokens": sums["prompt_tokens"],
            "computed_prompt_tokens": sums["prompt_tokens"] - sums["cached_tokens"],
            "output_tokens": sums["output_tokens"],
            "computed_output_tokens": sums["output_tokens"],
        }

    def table(self, outputs: Sequence[RequestOutput]) -> pa.Table:
        """One row for each output, in their order."""
        facts = {
            "finish_reason": [o.finish_reason for o in outputs],
            "prompt_tokens": [o.prompt_tokens for o in outputs],
            "cached_tokens": [o.cached_tokens for o in outputs],
            "output_tokens": [o.output_tokens for o in outputs],
            "error": [None if o.error is None else str(o.error) for o in outputs],
        }
        columns = [pa.array([o.text for o in outputs], pa.string())]
        columns += [pa.array(facts[name], kind) for name, kind in _FACTS.items()]
        return pa.table(columns, schema=self.schema)

    def append(self, table: pa.Table, outputs: Sequence[RequestOutput]) -> pa.Table:
        """Add one output a row, in the rows' order."""
        assert len(outputs) == table.num_rows, f"{len(outputs)} answers, {table.num_rows} rows"
        schema = pa.schema([*table.schema, *self.schema], metadata=table.schema.metadata)
        return pa.table([*table.columns, *self.table(outputs).columns], schema=schema)
