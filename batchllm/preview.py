"""What a run over a table would share and take: the plan without the model's weights."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from batchllm.cache.memory import default_kv_memory, free_memory
from batchllm.errors import UsageError
from batchllm.io.parquet import ParquetInput
from batchllm.models.checkpoint import open_model
from batchllm.models.dummy_checkpoint import DUMMY
from batchllm.prompting import prompt_tokenizer
from batchllm.report.plan import HEAD_ROWS, PlanReport, report_plan
from batchllm.report.simulation import SimulationReport, TableSimulation
from batchllm.simulate.machine import get_machine
from batchllm.simulate.saved import this_machine
from batchllm.simulate.shape import get_shape, shape_of
from batchllm.text.field_order import learn_field_order
from batchllm.text.prompts import PromptBuilder, PromptSpec
from batchllm.windows import Windows

THIS_MACHINE = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewConfig:
    """Everything `batchllm plan` is told.

    `max_tokens` is how long an answer is where no column says; `machine`, `model_shape` (None: the
    model's own) and `kv_memory` (bytes; None: what the machine has) are what time is estimated for,
    and `simulate` does so under each policy. With `load_format="dummy"` a model of that shape is
    also what prompts are made for.
    """

    input: str
    prompt: PromptSpec
    model: str | None = None
    load_format: str = "auto"
    max_tokens: int = 256
    window_rows: int = 65_536
    limit: int | None = None
    simulate: bool = False
    machine: str = THIS_MACHINE
    model_shape: str | None = None
    kv_memory: int | None = None

    def __post_init__(self) -> None:
        for name in ("window_rows", "limit", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Preview:
    """What is shared and, where asked for, the time under each policy."""

    plan: PlanReport
    simulation: SimulationReport | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        extra = {} if self.simulation is None else {"simulation": self.simulation.as_dict()}
        return self.plan.as_dict() | extra

    def as_text(self) -> str:
        """The page a person reads."""
        extra = "" if self.simulation is None else f"\n\n{self.simulation.as_text()}"
        return self.plan.as_text() + extra


def preview(config: PreviewConfig) -> Preview:
    """Plan the input's rows as a run would.

    Raises:
        BatchLLMError: the input or the model cannot be read, or an option makes no sense.
    """
    source = ParquetInput(config.input)
    config.prompt.check(source.schema)
    checkpoint = open_model(
        config.model,
        load_format=config.load_format,
        model_shape=config.model_shape if config.load_format == DUMMY else None,
    )
    tokenizer = prompt_tokenizer(checkpoint, config.prompt)
    num_rows = min(source.num_rows, config.limit or source.num_rows)
    wanted = np.ones(num_rows, dtype=np.bool_)
    everything = (rows.table for rows in source.read(wanted))
    builder = PromptBuilder(
        config.prompt,
        tokenizer,
        checkpoint.config.max_position_embeddings,
        vocab_size=checkpoint.config.vocab_size,
        field_rules=learn_field_order(config.prompt, everything, num_rows),
    )
    shape = shape_of(checkpoint.config, "bfloat16")
    if config.model_shape is not None:
        shape = get_shape(config.model_shape)
    here, room = config.machine == THIS_MACHINE, config.kv_memory
    if here and room is None:  # what a run would take
        room = default_kv_memory(free_memory())
    simulation = TableSimulation(
        this_machine() if here else get_machine(config.machine),
        shape,
        kv_tokens=None if room is None else int(room / shape.kv_bytes_per_token),
    )
    with (
        TemporaryDirectory(prefix="batchllm-") as scratch,
        closing(
            Windows(source, builder, wanted, window_rows=config.window_rows, scratch=Path(scratch))
        ) as windows,
    ):
        report = report_plan(
            (window.rows.table for window in windows),
            builder,
            tokenizer,
            max_tokens=config.max_tokens,
            kv_tokens=simulation.report.kv_tokens,
            spec=config.prompt,
            head=windows.head(HEAD_ROWS) if windows.count > 1 else None,
            expect=simulation.expect,
            also=simulation.add if config.simulate else lambda prompts: None,
        )
        report.window_repeated_tokens = windows.repeated_tokens
    if not here:
        report.machine = config.machine
    return Preview(report, simulation.report if config.simulate else None)
