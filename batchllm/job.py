"""A table from file to file: windows in, answers out, resumable."""

import json
import os
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from batchllm import __version__
from batchllm.api import LLM
from batchllm.config import EngineConfig
from batchllm.errors import OutputError, UsageError
from batchllm.io.answers import AnswerColumns
from batchllm.io.output import OutputStore
from batchllm.io.parquet import ParquetInput
from batchllm.io.sources import check_paths
from batchllm.metrics import Metrics
from batchllm.models.checkpoint import Checkpoint, open_model
from batchllm.progress import Progress
from batchllm.prompt_worker import PromptWorker, prompts_ahead
from batchllm.prompting import choose_max_model_len, prompt_builder
from batchllm.request import SamplingParams
from batchllm.runner.dtype import choose_dtype
from batchllm.text.field_order import learn_field_order
from batchllm.text.prompts import PromptBuilder, PromptSpec
from batchllm.windows import Windows

DEFAULT_WINDOW_ROWS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """Everything `batchllm run` is told.

    `limit` answers the first rows only; `max_errors` is how many failed rows still count as
    success, None for any number.
    """

    input: str
    output: str
    prompt: PromptSpec
    model: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineConfig = field(default_factory=EngineConfig)
    output_column: str = "answer"
    window_rows: int = DEFAULT_WINDOW_ROWS
    limit: int | None = None
    max_errors: int | None = None
    summary: Path | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("window_rows", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        if self.max_errors is not None and self.max_errors < 0:
            raise UsageError(f"max_errors is {self.max_errors}; it must be 0 or more")


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended. `already_complete` means that there was nothing to do."""

    summary: dict[str, Any]
    already_complete: bool
    too_many_errors: bool


def run_job(config: JobConfig) -> JobResult:
    """Answer the input's rows and write them to the output; goes on where an earlier run stopped.

    Everything that can be refused is refused before the weights are loaded.

    Raises:
        BatchLLMError: the job cannot start or go on; what is written so far stays valid.
    """
    started = time.perf_counter()
    notify = _silent if config.quiet else _say
    _check_summary_path(config.summary)
    check_paths(config.input, config.output)
    source = ParquetInput(config.input)
    config.prompt.check(source.schema)
    columns = AnswerColumns.choose(source.schema, config.output_column)
    checkpoint = open_model(config.model, notify=notify)
    prompt_builder(checkpoint, config.engine, config.prompt)  # refuses what it cannot make
    num_rows = min(source.num_rows, config.limit or source.num_rows)
    identity = job_identity(config, source, checkpoint, num_rows)
    with OutputStore.open(
        config.output, source.schema, columns.schema, identity, num_rows=num_rows
    ) as store:
        complete = store.is_complete
        if not complete:
            _answer(config, source, checkpoint, columns, store, started)
        assert store.summary is not None
        summary = store.summary
    if config.summary is not None:
        _write_summary(config.summary, summary)
    failed = int(summary["failed"])
    too_many = config.max_errors is not None and failed > config.max_errors
    return JobResult(summary, complete, too_many)


def job_identity(
    config: JobConfig, source: ParquetInput, checkpoint: Checkpoint, num_rows: int
) -> dict[str, Any]:
    """What must be the same for two runs' answers to belong in one output."""
    return {
        "input": {"sha256": source.content_hash(), "rows": num_rows},
        "model": {
            **checkpoint.identity(),
            "tokenizer": checkpoint.tokenizer().fingerprint,
            "dtype": choose_dtype(config.engine, checkpoint.config.dtype),
            "quantization": config.engine.quantization,
            "max_model_len": choose_max_model_len(checkpoint, config.engine),
        },
        "prompt": asdict(config.prompt),
        "sampling": asdict(config.sampling),
        "output_column": config.output_column,
    }


def _answer(
    config: JobConfig,
    source: ParquetInput,
    checkpoint: Checkpoint,
    columns: AnswerColumns,
    store: OutputStore,
    started: float,
) -> None:
    num_rows, done_rows = len(store.finished), int(store.finished.sum())
    progress = Progress(num_rows, done_rows=done_rows, quiet=config.quiet)
    if done_rows:
        progress.note(f"going on after {done_rows:,} rows that are done already")
    load_seconds, num_kv_blocks, kv_memory, threads = 0.0, 0, 0, 0
    policy = config.engine.policy
    if done_rows < num_rows:
        try:
            llm = _answer_windows(config, source, checkpoint, columns, store, progress)
        finally:
            progress.close()
        load_seconds, threads = llm.load_seconds, llm.threads.count
        num_kv_blocks, kv_memory = llm.num_kv_blocks, llm.kv_memory
        if llm.chosen_policies:
            policy = f"{policy} ({', '.join(sorted(llm.chosen_policies))})"
    total = Metrics.total(store.counters)
    store.finish(
        {
            "version": __version__,
            "input": str(config.input),
            "output": str(config.output),
            "model": str(checkpoint.path.name),
            "dtype": choose_dtype(config.engine, checkpoint.config.dtype),
            "quantization": config.engine.quantization,
            "policy": policy,
            "sharing": config.engine.sharing,
            **total.as_dict(),
            "saved_share": round(total.saved_share, 6),
            "window_lost_share": round(total.window_lost_share, 6),
            "threads": threads,
            "kv_memory": kv_memory,
            "kv_tokens": num_kv_blocks * config.engine.block_size,
            "num_kv_blocks": num_kv_blocks,
            "block_size": config.engine.block_size,
            "resumed_rows": done_rows,
            "load_seconds": round(load_seconds, 6),
            "wall_seconds": round(time.perf_counter() - started, 6),
        },
        source,
    )


def _answer_windows(
    config: JobConfig,
    source: ParquetInput,
    checkpoint: Checkpoint,
    columns: AnswerColumns,
    store: OutputStore,
    progress: Progress,
) -> LLM:
    builder = _learned_builder(config, source, checkpoint, len(store.finished))
    num_left = int((~store.finished).sum())
    if num_left > config.window_rows:
        progress.note(f"sorting {num_left:,} rows into windows by their prompts")
    windows = Windows(
        source, builder, ~store.finished, window_rows=config.window_rows, scratch=store.scratch
    )
    with closing(windows), closing(PromptWorker(builder)) as worker:
        prompted = prompts_ahead(windows, worker)
        llm = LLM(checkpoint, config.engine)
        progress.note(f"{len(store.finished):,} rows, {llm.describe()}")
        for one in prompted:
            rows = one.window.rows.index
            llm.metrics = Metrics(
                prompt_seconds=one.waited_seconds,
                window_repeated_tokens=one.window.repeated_tokens,
            )
            requests, errors = one.prompts.requests(config.sampling, rows)
            outputs = llm.answer(requests, errors, progress=progress)
            store.write_answers(rows, columns.table(outputs), llm.metrics.as_dict())
    return llm


def _learned_builder(
    config: JobConfig, source: ParquetInput, checkpoint: Checkpoint, num_rows: int
) -> PromptBuilder:
    """Learns from all of the job's rows, however many are done, so that a resumed job is alike."""
    plain = prompt_builder(checkpoint, config.engine, config.prompt)
    everything = source.read(np.ones(num_rows, dtype=np.bool_), plain.columns_of(source.schema))
    rules = learn_field_order(config.prompt, (rows.table for rows in everything), num_rows)
    return prompt_builder(checkpoint, config.engine, config.prompt, rules)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass


def _check_summary_path(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: the summary must be a file in a directory that exists")


def _write_summary(path: Path, summary: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
        os.replace(temporary, path)  # noqa: PTH105 - the same call as everywhere in io
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
