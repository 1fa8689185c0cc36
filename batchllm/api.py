"""The one entry that the command line, Python and the integrations go through."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from batchllm.config import EngineConfig
from batchllm.describe import loaded_text
from batchllm.engine import Engine
from batchllm.errors import OutOfMemoryError, UsageError
from batchllm.io.answers import AnswerColumns
from batchllm.metrics import Metrics
from batchllm.models.checkpoint import Checkpoint, open_model
from batchllm.models.parallel import check_divides
from batchllm.outputs import count, failed_output, row_outputs
from batchllm.planning import WindowPlanner
from batchllm.prefix.plan import PrefixPlan
from batchllm.prefix.policies.registry import check_policy
from batchllm.prompting import Prompt, choose_max_model_len, prompt_builder, table_of, tables_of
from batchllm.replica_messages import ReplicaLoaded
from batchllm.replicas import Replicas
from batchllm.request import Request, RequestOutput, RowError, SamplingParams
from batchllm.runner.clock import Clock
from batchllm.runner.load import load_runner
from batchllm.runner.loaded import LoadedRunner
from batchllm.scheduler.base import StepScheduler
from batchllm.scheduler.batch import Batch, FinishedSequence
from batchllm.scheduler.factory import SchedulerLimits, make_scheduler
from batchllm.scheduler.lengths import LengthEstimator
from batchllm.simulate.cost import CostModel
from batchllm.simulate.saved import this_machine
from batchllm.simulate.shape import shape_of
from batchllm.text.field_order import ColumnRules, learn_field_order
from batchllm.text.prompts import PromptBatch, PromptSpec
from batchllm.watch import Onlooker, Pace, Watch

_KEEP_SECONDS = 0.5  # the longest pause between hand-overs of answers
NOBODY = Watch()
_TRIES = 5  # for a window, each with half the memory of the one before


class LLM:
    """A model, loaded once and ready to answer tables.

    Args:
        model: a directory with safetensors, a GGUF file, a Hugging Face hub id, a registered
            name, or an opened checkpoint; None is the default model.
        config: how the engine runs; or give its fields as keywords (`dtype=…, kv_memory=…`).
        clock: takes the times of a step's parts, for measuring.
        load_format: "dummy" for random weights instead of a model; needs a `model_shape`.
        model_shape: of what model, like "llama-3.1-8b".

    Raises:
        ModelError: the model cannot be found or loaded.
        UsageError: an option is unknown or out of range.
    """

    def __init__(
        self,
        model: str | Path | Checkpoint | None = None,
        config: EngineConfig | None = None,
        *,
        clock: Clock | None = None,
        load_format: str = "auto",
        model_shape: str | None = None,
        **options: Any,
    ) -> None:
        if config is not None and options:
            raise UsageError(f"give a config or options, not both: {', '.join(options)}")
        started = time.perf_counter()
        self.config = config or EngineConfig.from_options(**options)
        check_policy(self.config.policy)
        if isinstance(model, str | Path | None):
            name = None if model is None else str(model)
            model = open_model(name, load_format=load_format, model_shape=model_shape)
        elif (load_format, model_shape) != ("auto", None):
            raise UsageError("an opened checkpoint is given; leave out load_format and model_shape")
        self.checkpoint = model
        self.max_model_len = choose_max_model_len(model, self.config)
        self.tokenizer = model.tokenizer()
        check_divides(model.config, self.config.tensor_parallel_size)
        self._replicas: Replicas | None = None
        self._end_processes: Callable[[], object]
        if self.config.data_parallel_size > 1:
            self._replicas = Replicas(model, self.config)
            loaded: LoadedRunner | ReplicaLoaded = self._replicas.loaded
            self._end_processes = self._replicas.close
        else:
            loaded = local = load_runner(model, self.config, self.max_model_len, clock)
            self.runner, self._end_processes = local.runner, local.close
        self.loaded = loaded
        self.dtype, self.threads = loaded.dtype, loaded.threads
        self.attention, self.device = loaded.attention, loaded.device
        step = self.config.step_limits(loaded.device)
        self.limits = SchedulerLimits(
            num_blocks=loaded.num_blocks,
            block_size=self.config.block_size,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=step.max_num_batched_tokens,
            max_num_seqs=step.max_num_seqs,
        )
        self._lengths = LengthEstimator()
        self.shape = shape_of(model.config, loaded.dtype, loaded.kv_bytes_per_token)
        self.machine = this_machine(gpu=loaded.hardware).with_overlap(loaded.overlap)
        self._costs = CostModel(self.machine, self.shape)
        self._scheduler = self.new_scheduler()
        self.load_seconds = time.perf_counter() - started
        self.metrics = Metrics()
        self._planner = WindowPlanner(
            policy=self.config.policy,
            sharing=self.config.sharing,
            granularity=loaded.granularity,
            lengths=self._lengths,
            costs=self._costs,
        )

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool | None = None,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: pa.Table,
        sampling_params: SamplingParams | None = None,
        *,
        output_column: str = "answer",
        **prompt: Any,
    ) -> pa.Table: ...

    def generate(
        self,
        prompts: Sequence[Prompt] | pa.Table,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat: bool | None = None,
        output_column: str = "answer",
        **prompt: Any,
    ) -> list[RequestOutput] | pa.Table:
        """Answer prompts (texts or token ids), or the rows of an Arrow table.

        Args:
            prompts: texts and lists of token ids; or a table, and then `prompt_column=`,
                `messages_column=`, `token_ids_column=` or `template=` says where its prompts are
                (see `PromptSpec`).
            sampling_params: one for all, or one a prompt.
            chat: wrap texts in the chat template; None does where the model has one.
            output_column: of a table, the answer's column.
            **prompt: of a table, the fields of a `PromptSpec`.

        Returns:
            One output a prompt, in order; or the table with the answer columns added.

        Raises:
            UsageError: an argument makes no sense. A bad row is an output with an error.
        """
        if isinstance(prompts, pa.Table):
            if not isinstance(sampling_params, SamplingParams | None):
                raise UsageError("for a table, give one SamplingParams, and a max_tokens_column")
            spec = PromptSpec(chat=chat, **prompt)
            return self.generate_table(prompts, spec, sampling_params, output_column=output_column)
        if prompt:
            raise UsageError(f"{', '.join(prompt)} only applies to a table")
        return self._generate_list(prompts, sampling_params or SamplingParams(), chat)

    def chat(
        self,
        conversations: Sequence[Sequence[dict[str, str]]],
        sampling_params: SamplingParams | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, each a list of messages with `role` and `content`."""
        table = table_of(conversations)
        batch = self._build(table, PromptSpec(messages_column="messages"))
        params = sampling_params or SamplingParams()
        return self.answer(*batch.requests(params, np.arange(table.num_rows)))

    def generate_table(
        self,
        table: pa.Table,
        spec: PromptSpec,
        sampling_params: SamplingParams | None = None,
        *,
        output_column: str = "answer",
        first_row: int = 0,
        watch: Watch = NOBODY,
    ) -> pa.Table:
        """Answer the rows of one table, planned together; returns it with answer columns added.

        `first_row` is the table's place in the whole input: seeds go by a row's index there.
        What `spec.reorder_fields` needs is learned from this table.
        """
        spec.check(table.schema)
        columns = AnswerColumns.choose(table.schema, output_column)
        rules = learn_field_order(spec, [table], table.num_rows)
        rows = first_row + np.arange(table.num_rows)
        requests, errors = self._build(table, spec, rules).requests(
            sampling_params or SamplingParams(), rows
        )
        return columns.append(table, self.answer(requests, errors, watch=watch))

    def answer(
        self,
        requests: Sequence[Request],
        errors: dict[int, RowError] | None = None,
        *,
        watch: Watch = NOBODY,
    ) -> list[RequestOutput]:
        """Answer requests, planned together.

        Args:
            requests: what to answer.
            errors: rows that failed before, by row index.
            watch: looks on, and may stop it.

        Returns:
            One output for each request and error, by row index; where it stopped, of those that
            were finished.
        """
        outputs = [failed_output(row, error) for row, error in (errors or {}).items()]
        self.metrics.rows += len(outputs)
        self.metrics.failed += len(outputs)
        if watch.progress:
            watch.progress.finish_rows(len(outputs))
        left = list(requests)
        for attempt in range(_TRIES):
            if attempt:
                self._shrink(watch.progress)
            done = self._plan_and_run(left, watch)
            outputs += done
            if len(done) == len(left) or watch.should_stop():
                break
            answered = {output.row_index for output in done}
            left = [request for request in left if request.row_index not in answered]
        else:
            raise OutOfMemoryError(
                f"memory ran out {_TRIES} times, the last with {self.kv_memory / 2**20:,.0f} MiB "
                "for KV; free some, or give less with --kv-memory and --max-num-batched-tokens"
            )
        self.metrics.windows += 1
        return sorted(outputs, key=lambda o: o.row_index)

    def _build(
        self, table: pa.Table, spec: PromptSpec, rules: ColumnRules | None = None
    ) -> PromptBatch:
        started = time.perf_counter()
        batch = prompt_builder(self.checkpoint, self.config, spec, rules).build(table)
        self.metrics.prompt_seconds += time.perf_counter() - started
        return batch

    def _plan_and_run(self, requests: Sequence[Request], watch: Watch) -> list[RequestOutput]:
        started = time.perf_counter()
        if self._replicas is not None:
            answers = self._replicas.answer(requests, self.limits, self._costs, watch)
            self._planner.chosen |= answers.policies
            self.metrics.add(answers.metrics)
            self.metrics.engine_seconds += time.perf_counter() - started
            return answers.outputs
        plan = self._planner.plan(requests, self.limits)
        planned = time.perf_counter()
        outputs = self._run(plan, watch)
        self.metrics.plan_seconds += planned - started
        self.metrics.engine_seconds += time.perf_counter() - planned
        return outputs

    def close(self) -> None:
        """End the processes that the model runs in, if there are others than this; the last call.

        They also end with this process, however it does, and when nobody has the `LLM` any more.
        """
        self._end_processes()

    @property
    def chosen_policies(self) -> set[str]:
        """What `auto` took, for the windows so far."""
        return self._planner.chosen

    @property
    def num_kv_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self.limits.num_blocks

    @property
    def num_kv_tokens(self) -> int:
        """Tokens whose KV the cache holds."""
        return self.num_kv_blocks * self.config.block_size

    @property
    def kv_memory(self) -> int:
        """Bytes of the KV cache."""
        return int(self.num_kv_tokens * self.shape.kv_bytes_per_token)

    def describe(self) -> str:
        """What is loaded and what it runs on, in a line; each warning is a line of its own."""
        return loaded_text(self)

    def new_scheduler(self) -> StepScheduler:
        """A scheduler for this model's KV cache; one at a time may run."""
        eos = frozenset(self.tokenizer.eos_token_ids)
        return make_scheduler(self.config.policy, self.limits, eos, self._lengths)

    def _run(self, plan: PrefixPlan, watch: Watch) -> list[RequestOutput]:
        """Outputs of all rows, or of those finished when it was to stop or memory ran out."""
        tree, progress, scheduler = plan.tree, watch.progress, self._scheduler
        num_rows = tree.row_counts()
        before = replace(scheduler.stats)
        finished: list[FinishedSequence] = []
        outputs: list[RequestOutput] = []
        num_kept, pace = 0, Pace(_KEEP_SECONDS)
        second_look = self._planner.second_look(plan, scheduler, self.limits)

        def make(sequences: list[FinishedSequence]) -> list[RequestOutput]:
            return row_outputs(plan, sequences, self.tokenizer, scheduler, self.limits)

        def tell_rows(batch: Batch) -> None:
            if watch.before_step:
                leaves = np.union1d(scheduler.running_leaves(), batch.samples.leaf)
                watch.before_step(plan.rows_of(leaves))

        engine = Engine(scheduler, self.runner, before_step=tell_rows)
        if progress:
            progress.start_window(plan)
            engine.on_step = progress.on_step
        try:
            with closing(engine.steps(plan)) as steps:
                for done in steps:
                    finished += done
                    if second_look:
                        second_look.after_step(len(finished))
                    if progress:
                        progress.finish_rows(sum(int(num_rows[sequence.leaf]) for sequence in done))
                    if watch.should_stop():
                        break
                    if len(finished) > num_kept and pace.is_due:
                        with pace.hand_over():
                            outputs += (new := make(finished[num_kept:]))
                            watch.keep(new)
                        num_kept = len(finished)
        except OutOfMemoryError:
            pass  # the caller sees who is missing
        except BaseException:  # it leaves sequences behind; the next window starts clean
            self._scheduler = self.new_scheduler()
            raise
        if scheduler.has_unfinished:
            self._scheduler = self.new_scheduler()
        outputs += make(finished[num_kept:])
        stats = scheduler.stats.since(before)
        self.metrics.add(count(plan, finished, outputs, stats, scheduler.peak_kv_blocks))
        return outputs

    def run_at_most(self, max_num_seqs: int | None) -> None:
        """Run so many sequences at once from the next window on; None is as many as it may."""
        max_num_seqs = max_num_seqs or self.config.step_limits(self.device).max_num_seqs
        if max_num_seqs != self.limits.max_num_seqs:
            self.limits = replace(self.limits, max_num_seqs=max_num_seqs)
            self._scheduler = self.new_scheduler()

    def _shrink(self, progress: Onlooker | None) -> None:
        """Go on with half the KV memory and half as many tokens a step; all KV held is lost."""
        num_blocks = self.runner.shrink(max(self.num_kv_blocks // 2, 1))
        most = max(self.limits.max_num_batched_tokens // 2, 1)
        self.limits = replace(self.limits, num_blocks=num_blocks, max_num_batched_tokens=most)
        self._scheduler = self.new_scheduler()
        self.metrics.pool_shrinks += 1
        if progress:
            progress.note(
                f"memory ran out; going on with {self.kv_memory / 2**20:,.0f} MiB of KV memory and "
                f"at most {most:,} tokens a step"
            )

    def _generate_list(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        chat: bool | None,
    ) -> list[RequestOutput]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts, but {len(each)} SamplingParams")
        requests: list[Request] = []
        errors: dict[int, RowError] = {}
        for rows, table, spec in tables_of(prompts, chat):
            made, failed = self._build(table, spec).requests(SamplingParams(), rows)
            requests += [replace(r, sampling_params=each[r.row_index]) for r in made]
            errors |= failed
        return self.answer(sorted(requests, key=lambda r: r.row_index), errors)
