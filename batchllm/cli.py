"""The command line: run, plan, bench, inspect, verify, models."""

import json
from typing import Annotated

import typer

from batchllm import __version__
from batchllm.cli_models import models_app
from batchllm.cli_options import (
    AnswerTokens,
    AsJson,
    AttentionBackendName,
    Chat,
    DataParallelSize,
    Deterministic,
    Device,
    Dtype,
    DummyShape,
    IgnoreEos,
    Input,
    KVCacheDtype,
    KvMemory,
    Limit,
    LoadFormat,
    MachineKvMemory,
    MachineName,
    MaxErrors,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    MaxTokens,
    MaxTokensColumn,
    MessagesColumn,
    ModelName,
    ModelShapeName,
    OnError,
    Output,
    OutputColumn,
    Overlap,
    Overwrite,
    Policy,
    PromptColumn,
    Quantization,
    Quiet,
    ReorderFields,
    RetryFailed,
    Seed,
    Sharing,
    Simulate,
    Summary,
    System,
    Temperature,
    Template,
    TensorParallelSize,
    Threads,
    TokenIdsColumn,
    TopK,
    TopP,
    WindowRows,
    template_text,
)
from batchllm.error_limit import ErrorLimit
from batchllm.errors import UsageError
from batchllm.exit_codes import FAILED, TOO_MANY_ERRORS, errors_as_exit_codes
from batchllm.interrupt import StopSignals

app = typer.Typer(
    help="Run a language model over a table: Parquet in, Parquet out, "
    "every shared prompt prefix computed once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(models_app, name="models")


@app.command()
def run(
    input: Input,  # noqa: A002 - the word users read in the help
    output: Output,
    model: ModelName = None,
    load_format: LoadFormat = "auto",
    model_shape: DummyShape = None,
    prompt_column: PromptColumn = None,
    messages_column: MessagesColumn = None,
    token_ids_column: TokenIdsColumn = None,
    template: Template = None,
    reorder_fields: ReorderFields = False,
    system: System = None,
    chat: Chat = None,
    output_column: OutputColumn = "answer",
    max_tokens: MaxTokens = 256,
    max_tokens_column: MaxTokensColumn = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    ignore_eos: IgnoreEos = False,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    deterministic: Deterministic = False,
    policy: Policy = "auto",
    sharing: Sharing = True,
    device: Device = "auto",
    attention_backend: AttentionBackendName = "auto",
    overlap: Overlap = True,
    threads: Threads = None,
    tensor_parallel_size: TensorParallelSize = 1,
    data_parallel_size: DataParallelSize = 1,
    kv_memory: KvMemory = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    window_rows: WindowRows = 65_536,
    max_errors: MaxErrors = None,
    on_error: OnError = "continue",
    retry_failed: RetryFailed = False,
    overwrite: Overwrite = False,
    limit: Limit = None,
    summary: Summary = None,
    quiet: Quiet = False,
) -> None:
    """Answer every row of INPUT and write it, in order, to OUTPUT.

    The same command again goes on where it stopped. Exit codes: 0 done, 1 failed, 2 wrong usage,
    3 done with more failed rows than --max-errors, 130 interrupted.
    """
    with (
        StopSignals() as stop,
        errors_as_exit_codes(
            f"interrupted; the same command goes on with {output} where this one stopped"
        ),
    ):
        from batchllm.config import EngineConfig, parse_size
        from batchllm.job import JobConfig, run_job
        from batchllm.report.summary import summary_text
        from batchllm.request import SamplingParams
        from batchllm.text.prompt_spec import PromptSpec

        result = run_job(
            JobConfig(
                input=input,
                output=output,
                model=model,
                load_format=load_format,
                model_shape=model_shape,
                prompt=PromptSpec(
                    prompt_column=prompt_column,
                    messages_column=messages_column,
                    token_ids_column=token_ids_column,
                    template=template_text(template),
                    system=system,
                    chat=chat,
                    max_tokens_column=max_tokens_column,
                    reorder_fields=reorder_fields,
                ),
                sampling=SamplingParams(
                    max_tokens=max_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    seed=seed,
                    ignore_eos=ignore_eos,
                ),
                engine=EngineConfig(
                    dtype=dtype,
                    quantization=quantization,
                    kv_cache_dtype=kv_cache_dtype,
                    deterministic=deterministic,
                    policy=policy,
                    sharing=sharing,
                    device=device,
                    attention_backend=attention_backend,
                    overlap=overlap,
                    threads=threads,
                    tensor_parallel_size=tensor_parallel_size,
                    data_parallel_size=data_parallel_size,
                    kv_memory=None if kv_memory is None else parse_size(kv_memory),
                    max_model_len=max_model_len,
                    max_num_seqs=max_num_seqs,
                    max_num_batched_tokens=max_num_batched_tokens,
                ),
                output_column=output_column,
                window_rows=window_rows,
                limit=limit,
                max_errors=ErrorLimit.parse(max_errors),
                on_error=on_error,
                retry_failed=retry_failed,
                overwrite=overwrite,
                summary=summary,
                quiet=quiet,
            ),
            stop,
        )
        if not quiet:
            if result.already_complete:
                typer.echo(f"{output} is complete already; it was left as it is", err=True)
            if result.summary is not None:
                typer.echo(summary_text(result.summary), err=True)
        if result.summary is None:
            typer.echo(
                f"stopped by --on-error: {result.num_failed:,} rows failed; the same command with "
                f"--retry-failed, or without --on-error, goes on with {output}",
                err=True,
            )
            raise typer.Exit(TOO_MANY_ERRORS)
        if result.too_many_errors:
            typer.echo(f"{result.num_failed:,} rows failed, --max-errors is {max_errors}", err=True)
            raise typer.Exit(TOO_MANY_ERRORS)


@app.command()
def plan(
    input: Input,  # noqa: A002
    model: ModelName = None,
    load_format: LoadFormat = "auto",
    prompt_column: PromptColumn = None,
    messages_column: MessagesColumn = None,
    token_ids_column: TokenIdsColumn = None,
    template: Template = None,
    reorder_fields: ReorderFields = False,
    system: System = None,
    chat: Chat = None,
    max_tokens_column: MaxTokensColumn = None,
    max_tokens: AnswerTokens = 256,
    window_rows: WindowRows = 65_536,
    limit: Limit = None,
    simulate: Simulate = False,
    machine: MachineName = "cpu",
    model_shape: ModelShapeName = None,
    kv_memory: MachineKvMemory = None,
    as_json: AsJson = False,
) -> None:
    """Show what prompts INPUT's rows share. Needs the model's tokenizer, not its weights.

    With --simulate also how long a run would take on a machine, under each policy, if every answer
    had --max-tokens tokens (or what --max-tokens-column says).
    """
    with errors_as_exit_codes("interrupted"):
        from batchllm.config import parse_size
        from batchllm.preview import PreviewConfig, preview
        from batchllm.text.prompts import PromptSpec

        page = preview(
            PreviewConfig(
                input=input,
                prompt=PromptSpec(
                    prompt_column=prompt_column,
                    messages_column=messages_column,
                    token_ids_column=token_ids_column,
                    template=template_text(template),
                    system=system,
                    chat=chat,
                    max_tokens_column=max_tokens_column,
                    reorder_fields=reorder_fields,
                ),
                model=model,
                load_format=load_format,
                max_tokens=max_tokens,
                window_rows=window_rows,
                limit=limit,
                simulate=simulate,
                machine=machine,
                model_shape=model_shape,
                kv_memory=None if kv_memory is None else parse_size(kv_memory),
            )
        )
        typer.echo(json.dumps(page.as_dict(), indent=2) if as_json else page.as_text())


@app.command()
def bench(
    model: ModelName = None,
    load_format: LoadFormat = "auto",
    model_shape: DummyShape = None,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    device: Device = "auto",
    threads: Threads = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Measure this machine first, and keep that for plan and auto."
        ),
    ] = False,
) -> None:
    """Run a few workloads: how fast this machine is, where the time goes, what was predicted."""
    with errors_as_exit_codes("interrupted"):
        from batchllm.api import LLM
        from batchllm.bench import CHECKS, Bench
        from batchllm.runner.clock import Clock
        from batchllm.simulate.saved import save_machine

        if calibrate and quantization is not None:
            raise UsageError("--calibrate measures the model as plan and auto know it: unquantized")
        clock = Clock()
        llm = LLM(
            model,
            clock=clock,
            load_format=load_format,
            model_shape=model_shape,
            dtype=dtype,
            quantization=quantization,
            device=device,
            threads=threads,
        )
        typer.echo(llm.describe(), err=True)
        bench = Bench(llm, clock)
        if calibrate:
            machine, results = bench.calibrate(CHECKS, lambda text: typer.echo(text, err=True))
            typer.echo(machine.as_text())
            typer.echo(f"kept in {save_machine(machine)}")
            for result in results:
                typer.echo(result.as_text())
        else:
            for workload in CHECKS:
                typer.echo(bench.check(workload, llm.machine).as_text())


@app.command()
def inspect(
    output: Output,
    as_json: AsJson = False,
) -> None:
    """Show what the run that wrote OUTPUT did, or has done so far."""
    with errors_as_exit_codes("interrupted"):
        from batchllm.io.inspect import read_run
        from batchllm.report.summary import summary_text

        record = read_run(output)
        if as_json:
            plain = {
                "path": str(record.path),
                "state": record.state,
                "rows": record.num_rows,
                "finished_rows": record.num_finished_rows,
                "identity": dict(record.identity),
                "summary": None if record.summary is None else dict(record.summary),
            }
            typer.echo(json.dumps(plain, indent=2))
            return
        typer.echo(
            f"{record.path}: {record.state}, "
            f"{record.num_finished_rows:,} of {record.num_rows:,} rows"
        )
        if record.summary is not None:
            typer.echo(summary_text(record.summary))
        typer.echo(json.dumps(dict(record.identity), indent=2))


@app.command()
def verify(
    output: Output,
    source: Annotated[
        str | None,
        typer.Option("--input", help="Where the input is. [default: where it was]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check OUTPUT: every input row once, nothing damaged, files and records agree.

    Exit codes: 0 all is well, 1 something is not; it says what.
    """
    with errors_as_exit_codes("interrupted"):
        from batchllm.verify import verify as check

        verdict = check(output, source)
        typer.echo(json.dumps(verdict.as_dict(), indent=2) if as_json else verdict.as_text())
        if not verdict.is_good:
            raise typer.Exit(FAILED)


def version(show: bool) -> None:
    """Print the version and leave."""
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of the command itself; its help is the app's."""


def main() -> None:
    """The `batchllm` command."""
    app()


if __name__ == "__main__":
    main()
