"""What is to be generated, and with what: the same for every worker of a cluster."""

import difflib
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

from batchllm.config import EngineConfig
from batchllm.errors import UsageError
from batchllm.io.answers import AnswerColumns
from batchllm.models.checkpoint import ModelSource
from batchllm.request import SamplingParams
from batchllm.text.field_order import ColumnRules
from batchllm.text.prompts import PromptSpec
from batchllm.windows import DEFAULT_WINDOW_ROWS

ROW = "__batchllm_row"
"""The column of a row's number in the whole table while rows are under way."""
PLACE = "__batchllm_place"
"""The column of where a row's prompt lies: a fine range, or what an engine finds its place by."""
_OURS = (ROW, PLACE)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """A call of `generate`; pickles, and is all that a worker is told.

    Attributes:
        model: opened by each worker itself: weights are never sent.
        config: how its engine runs.
        spec: what prompts are made of.
        params: how answers are sampled.
        output_column: the answer's column.
        window_rows: about how many rows a worker plans together, at most.
        field_rules: learned from the whole table, for `spec.reorder_fields`.
    """

    model: ModelSource
    config: EngineConfig
    spec: PromptSpec
    params: SamplingParams
    output_column: str = "answer"
    window_rows: int = DEFAULT_WINDOW_ROWS
    field_rules: ColumnRules | None = None

    @classmethod
    def of_options(
        cls,
        *,
        model: str | None = None,
        output_column: str = "answer",
        window_rows: int = DEFAULT_WINDOW_ROWS,
        load_format: str = "auto",
        model_shape: str | None = None,
        **options: Any,
    ) -> "GenerateCall":
        """Build from keywords, as users give them.

        Args:
            model: a path that all workers can read, a hub id or a registered name.
            output_column: the answer's column.
            window_rows: see above.
            load_format: see `open_model`.
            model_shape: see `open_model`.
            **options: fields of `PromptSpec`, `SamplingParams` and `EngineConfig`.

        Raises:
            UsageError: a name or a value makes no sense; the message names the nearest known.
        """
        groups = (PromptSpec, SamplingParams, EngineConfig)
        home = {field.name: group for group in groups for field in fields(group)}
        for name in options:
            if name not in home:
                near = difflib.get_close_matches(name, home, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(home)}"
                raise UsageError(f"unknown option {name!r}{hint}")
        if window_rows < 1:
            raise UsageError(f"window_rows is {window_rows}; it must be at least 1")
        spec, params, config = (
            group(**{name: value for name, value in options.items() if home[name] is group})
            for group in groups
        )
        assert isinstance(spec, PromptSpec) and isinstance(params, SamplingParams)
        assert isinstance(config, EngineConfig)
        return cls(
            model=ModelSource(model, load_format, model_shape),
            config=config,
            spec=spec,
            params=params,
            output_column=output_column,
            window_rows=window_rows,
        )

    def check(self, schema: pa.Schema) -> AnswerColumns:
        """Hold the call against a table's columns; returns those it will add.

        Raises:
            UsageError: a column is missing, of a wrong type, or already there.
        """
        self.spec.check(schema)
        if taken := [name for name in _OURS if name in schema.names]:
            raise UsageError(f"the column name {taken[0]!r} is for batchllm's own use; rename it")
        return AnswerColumns.choose(schema, self.output_column)

    def answered(self, schema: pa.Schema) -> pa.Schema:
        """The columns that rows of a table with this schema have when they are answered.

        Raises:
            UsageError: see `check`.
        """
        added = self.check(schema).schema
        row = pa.field(ROW, pa.int64(), nullable=False)
        return pa.schema([*schema, *added, row], metadata=schema.metadata)
