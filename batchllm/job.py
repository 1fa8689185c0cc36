"""A table from file to file: windows in, answers out, resumable."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchllm import __version__
from batchllm.api import LLM
from batchllm.config import EngineConfig
from batchllm.error_limit import NO_LIMIT, ErrorLimit
from batchllm.errors import OutputError, UsageError, WorkerCrashedError
from batchllm.interrupt import StopSignals
from batchllm.io.answers import AnswerColumns
from batchllm.io.in_flight import Suspects
from batchllm.io.output import OutputStore
from batchllm.io.parquet import ParquetInput
from batchllm.io.sources import check_paths
from batchllm.metrics import Metrics
from batchllm.models.checkpoint import Checkpoint, open_model
from batchllm.models.parallel import check_divides
from batchllm.outputs import failed_output
from batchllm.progress import Progress
from batchllm.prompt_worker import PromptedWindow, PromptWorker, prompts_ahead
from batchllm.prompting import choose_max_model_len, prompt_builder, prompt_tokenizer
from batchllm.request import RequestOutput, RowError, SamplingParams
from batchllm.runner.dtype import choose_dtype
from batchllm.text.field_order import learn_field_order
from batchllm.text.prompts import PromptBuilder, PromptSpec
from batchllm.watch import Watch
from batchllm.windows import DEFAULT_WINDOW_ROWS, Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """Everything `batchllm run` is told.

    `limit` answers the first rows only. `max_errors` is how many failed rows still count as
    success; with `on_error="stop"` the job stops when there are more, else it goes on to its end.
    `overwrite` deletes an output that is complete or another job's; `retry_failed` answers the rows
    again that have an error there.
    """

    input: str
    output: str
    prompt: PromptSpec
    model: str | None = None
    load_format: str = "auto"
    model_shape: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineConfig = field(default_factory=EngineConfig)
    output_column: str = "answer"
    window_rows: int = DEFAULT_WINDOW_ROWS
    limit: int | None = None
    max_errors: ErrorLimit = NO_LIMIT
    on_error: str = "continue"
    overwrite: bool = False
    retry_failed: bool = False
    summary: Path | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        for name in ("window_rows", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        if self.on_error not in ("continue", "stop"):
            raise UsageError(f"on_error is {self.on_error!r}; it must be continue or stop")


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended. `already_complete` means that there was nothing to do.

    `summary` is None where `on_error` stopped it; `num_failed` rows failed.
    """

    summary: dict[str, Any] | None
    already_complete: bool
    num_failed: int
    too_many_errors: bool


def run_job(config: JobConfig, stop: StopSignals | None = None) -> JobResult:
    """Answer the input's rows and write them to the output; goes on where an earlier run stopped.

    Everything that can be refused is refused before the weights are loaded.

    Args:
        config: what to do.
        stop: tells when the process is asked to stop; what is finished is written first.

    Raises:
        BatchLLMError: the job cannot start or go on; what is written so far stays valid.
        KeyboardInterrupt: it was asked to stop.
    """
    started = time.perf_counter()
    notify = _silent if config.quiet else _say
    _check_summary_path(config.summary)
    check_paths(config.input, config.output)
    OutputStore.refuse_busy(config.output)
    source = ParquetInput(config.input)
    config.prompt.check(source.schema)
    columns = AnswerColumns.choose(source.schema, config.output_column)
    checkpoint = open_model(
        config.model,
        load_format=config.load_format,
        model_shape=config.model_shape,
        notify=notify,
    )
    prompt_builder(checkpoint, config.engine, config.prompt)  # refuses what it cannot make
    check_divides(checkpoint.config, config.engine.tensor_parallel_size)
    num_rows = min(source.num_rows, config.limit or source.num_rows)
    identity = job_identity(config, source, checkpoint, num_rows)
    limit = config.max_errors.of(num_rows)
    if limit is None and config.on_error == "stop":
        limit = 0
    with OutputStore.open(
        config.output,
        source.schema,
        columns.schema,
        identity,
        num_rows=num_rows,
        overwrite=config.overwrite,
        retry=columns.error if config.retry_failed else None,
    ) as store:
        complete = store.is_complete
        if not complete:
            job = _Job(config, source, checkpoint, columns, store, stop or StopSignals(), limit)
            job.run(started)
        summary = store.summary
        failed = store.num_failed if summary is None else int(summary["failed"])
    if config.summary is not None and summary is not None:
        _write_summary(config.summary, summary)
    return JobResult(summary, complete, failed, limit is not None and failed > limit)


def job_identity(
    config: JobConfig, source: ParquetInput, checkpoint: Checkpoint, num_rows: int
) -> dict[str, Any]:
    """What must be the same for two runs' answers to belong in one output."""
    return {
        "input": {"sha256": source.content_hash(), "rows": num_rows},
        "model": {
            **checkpoint.identity(),
            "tokenizer": prompt_tokenizer(checkpoint, config.prompt).fingerprint,
            "dtype": choose_dtype(config.engine, checkpoint.config.dtype),
            "quantization": _rounding(config.engine),
            "kv_cache_dtype": config.engine.kv_cache_dtype,
            "deterministic": config.engine.deterministic,
            "max_model_len": choose_max_model_len(checkpoint, config.engine),
        },
        "prompt": asdict(config.prompt),
        "sampling": asdict(config.sampling),
        "output_column": config.output_column,
    }


def _rounding(engine: EngineConfig) -> str | None:
    """How weights are rounded: processes that share a model have scales of their own."""
    if engine.quantization is None or engine.tensor_parallel_size == 1:
        return engine.quantization
    return f"{engine.quantization} in {engine.tensor_parallel_size} parts"


@dataclass(frozen=True, slots=True)
class _Phase:
    """Rows to answer, bool [num_rows]; `alone` if one at a time."""

    wanted: NDArray[np.bool_]
    alone: bool


@dataclass(frozen=True, slots=True)
class _Job:
    """A job whose output is begun; `limit` is how many failed rows it may have."""

    config: JobConfig
    source: ParquetInput
    checkpoint: Checkpoint
    columns: AnswerColumns
    store: OutputStore
    stop: StopSignals
    limit: int | None

    def run(self, started: float) -> None:
        """Answer what has no answer yet, and complete the output unless too many rows failed."""
        config, store = self.config, self.store
        if (left := store.journaled) is not None:
            store.write_answers(left.index, left.table, self.columns.counters(left.table))
        num_rows, done_rows = len(store.finished), int(store.finished.sum())
        progress = Progress(num_rows, done_rows=done_rows, quiet=config.quiet)
        if done_rows:
            progress.note(f"going on after {done_rows:,} rows that are done already")
        llm = None
        try:
            if done_rows < num_rows and not self._is_over(store.num_failed):
                llm = self._answer(progress)
            if store.finished.all():
                progress.note("writing the output")
                store.finish(self._summary(llm, done_rows, started), self.source)
        finally:
            progress.close()

    def _answer(self, progress: Progress) -> LLM:
        config, store, suspects = self.config, self.store, self.store.suspects
        builder = _learned_builder(config, self.source, self.checkpoint, len(store.finished))
        self._set_aside(suspects)
        llm = None
        with (
            ExitStack() as models,
            closing(PromptWorker(builder, always=suspects.has_crashed)) as worker,
            closing(store.in_flight()) as in_flight,
        ):
            for phase in self._phases(progress):
                windows = self._windows(builder, phase, progress)
                with closing(windows):
                    prompted = prompts_ahead(windows, worker)
                    if llm is None:
                        llm = models.enter_context(closing(LLM(self.checkpoint, config.engine)))
                        progress.note(f"{len(store.finished):,} rows, {llm.describe()}")
                    llm.run_at_most(1 if phase.alone else None)
                    note = partial(in_flight.note, alone=phase.alone)
                    for one in prompted:
                        try:
                            self._answer_window(llm, one, progress, note)
                        except WorkerCrashedError as crash:
                            if len(crash.rows):
                                note(np.array(crash.rows, dtype=np.int64))
                            in_flight.keep(crash.reason)
                            raise
                        if self._is_over(store.num_failed):
                            return llm
        assert llm is not None, "there is a phase for the rows left"
        return llm

    def _phases(self, progress: Progress) -> Iterator[_Phase]:
        """Rows that may have crashed an earlier process, one at a time; then the others."""
        store = self.store
        wanted = ~store.finished
        suspects = store.suspects.but_for(store.finished)
        if len(suspects.rows):
            progress.note(
                f"the process died ({suspects.reason}) with {len(suspects.rows):,} rows in flight; "
                "they are answered first, one at a time"
            )
            are_suspects = np.zeros_like(wanted)
            are_suspects[suspects.rows] = True
            yield _Phase(are_suspects, alone=True)
            wanted &= ~are_suspects
        yield _Phase(wanted, alone=False)

    def _set_aside(self, suspects: Suspects) -> None:
        """Give an error to rows that crashed a process with nothing else in flight."""
        if len(suspects.set_aside) == 0:
            return
        error = RowError(
            "process_died",
            f"the process died twice ({suspects.reason}) while it computed this row, the second "
            "time with no other in flight",
        )
        table = self.columns.table([failed_output(int(row), error) for row in suspects.set_aside])
        self.store.write_answers(suspects.set_aside, table, self.columns.counters(table))

    def _windows(self, builder: PromptBuilder, phase: _Phase, progress: Progress) -> Windows:
        window_rows = self.config.window_rows
        if (num_rows := int(phase.wanted.sum())) > window_rows:
            progress.note(f"sorting {num_rows:,} rows into windows by their prompts")
        return Windows(
            self.source,
            builder,
            phase.wanted,
            window_rows=window_rows,
            scratch=self.store.scratch,
        )

    def _answer_window(
        self,
        llm: LLM,
        one: PromptedWindow,
        progress: Progress,
        note_rows: Callable[[NDArray[np.int64]], None],
    ) -> None:
        """Answer a window, or the part of it that is finished when the job is asked to stop."""
        store, columns = self.store, self.columns
        requests, errors = one.prompts.requests(self.config.sampling, one.window.rows.index)
        num_failed = store.num_failed + len(errors)
        llm.metrics = Metrics(
            prompt_seconds=one.waited_seconds, window_repeated_tokens=one.window.repeated_tokens
        )

        def keep(outputs: list[RequestOutput]) -> None:
            nonlocal num_failed
            num_failed += sum(output.error is not None for output in outputs)
            store.journal(_rows(outputs), columns.table(outputs))

        def should_stop() -> bool:
            return self.stop.requested or self._is_over(num_failed)

        watch = Watch(progress=progress, keep=keep, should_stop=should_stop, before_step=note_rows)
        with self.stop.waited_for():
            outputs = llm.answer(requests, errors, watch=watch)
            if outputs:
                store.write_answers(_rows(outputs), columns.table(outputs), llm.metrics.as_dict())
        if self.stop.requested:
            raise KeyboardInterrupt

    def _is_over(self, num_failed: int) -> bool:
        """Whether so many failed rows end the job."""
        return self.config.on_error == "stop" and num_failed > (self.limit or 0)

    def _summary(self, llm: LLM | None, done_rows: int, started: float) -> dict[str, Any]:
        config, store = self.config, self.store
        total = Metrics.total(store.counters)
        total.rows, total.failed = len(store.finished), store.num_failed
        policy = config.engine.policy
        if llm is not None and llm.chosen_policies:
            policy = f"{policy} ({'; '.join(sorted(llm.chosen_policies))})"
        return {
            "version": __version__,
            "input": str(config.input),
            "output": str(config.output),
            "model": str(self.checkpoint.path.name),
            "dtype": choose_dtype(config.engine, self.checkpoint.config.dtype),
            "quantization": config.engine.quantization,
            "kv_cache_dtype": config.engine.kv_cache_dtype,
            "deterministic": config.engine.deterministic,
            "policy": policy,
            "sharing": config.engine.sharing,
            **total.as_dict(),
            "saved_share": round(total.saved_share, 6),
            "window_lost_share": round(total.window_lost_share, 6),
            "division_lost_share": round(total.division_lost_share, 6),
            "replicas": config.engine.data_parallel_size,
            "processes_per_replica": config.engine.tensor_parallel_size,
            "threads": llm.threads.count if llm else 0,
            "kv_memory": llm.kv_memory if llm else 0,
            "kv_tokens": llm.num_kv_tokens if llm else 0,
            "num_kv_blocks": llm.num_kv_blocks if llm else 0,
            "block_size": config.engine.block_size,
            "resumed_rows": done_rows,
            "load_seconds": round(llm.load_seconds, 6) if llm else 0.0,
            "wall_seconds": round(time.perf_counter() - started, 6),
        }


def _rows(outputs: list[RequestOutput]) -> NDArray[np.int64]:
    return np.array([output.row_index for output in outputs], dtype=np.int64)


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
