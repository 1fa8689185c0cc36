"""The options of the command line, as types that commands share."""

from pathlib import Path
from typing import Annotated

import typer

from batchllm.errors import UsageError

_PROMPT, _SAMPLING, _ENGINE = "Prompt (exactly one source)", "Sampling", "Engine"
_SIMULATION, _FAILURES = "Simulation", "Failures"
Input = Annotated[
    str, typer.Argument(metavar="INPUT", help="A Parquet file, a directory of them, or a glob.")
]
Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="A .parquet file or a directory.")]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Directory, GGUF file, hub id or name. [default: built in]"),
]
LoadFormat = Annotated[
    str,
    typer.Option(help="auto; or dummy: random weights for a --model-shape, to measure speed."),
]
DummyShape = Annotated[
    str | None,
    typer.Option("--model-shape", help="Of --load-format dummy, like llama-3.1-8b."),
]
PromptColumn = Annotated[
    str | None, typer.Option(help="Column of prompts.", rich_help_panel=_PROMPT)
]
MessagesColumn = Annotated[
    str | None,
    typer.Option(help="Column of chats: lists of role and content.", rich_help_panel=_PROMPT),
]
TokenIdsColumn = Annotated[
    str | None, typer.Option(help="Column of token ids.", rich_help_panel=_PROMPT)
]
Template = Annotated[
    str | None,
    typer.Option(
        help="Jinja template over the columns, like '{{ title }}'; or @FILE.",
        rich_help_panel=_PROMPT,
    ),
]
ReorderFields = Annotated[
    bool,
    typer.Option(
        "--reorder-fields",
        help="Put the fields of '{{ row | tojson }}' in the order in which rows share most. "
        "Answers can change with the order.",
        rich_help_panel=_PROMPT,
    ),
]
System = Annotated[str | None, typer.Option(help="System message.", rich_help_panel=_PROMPT)]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Wrap prompts in the model's chat template. [default: if it has one]",
        rich_help_panel=_PROMPT,
        show_default=False,
    ),
]
MaxTokensColumn = Annotated[
    str | None,
    typer.Option(help="Column of each row's own --max-tokens.", rich_help_panel=_SAMPLING),
]
WindowRows = Annotated[int, typer.Option(help="About how many rows are planned together.")]
Limit = Annotated[int | None, typer.Option(help="Only the first N rows.")]
OutputColumn = Annotated[str, typer.Option(help="The answer's column.")]
MaxTokens = Annotated[
    int, typer.Option(help="Longest answer, in tokens.", rich_help_panel=_SAMPLING)
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)]
TopP = Annotated[float, typer.Option(help="Nucleus sampling; 1 is off.", rich_help_panel=_SAMPLING)]
TopK = Annotated[
    int, typer.Option(help="Most likely tokens kept; 0 is off.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[
    int, typer.Option(help="A row draws by this and its index.", rich_help_panel=_SAMPLING)
]
IgnoreEos = Annotated[
    bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.", rich_help_panel=_SAMPLING)
]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16 or float32.", rich_help_panel=_ENGINE)]
Quantization = Annotated[
    str | None,
    typer.Option(
        help="int8 or fp8: weights and activations in eight bits; faster (fp8 on a GPU only), but "
        "answers differ. [default: none]",
        rich_help_panel=_ENGINE,
    ),
]
KVCacheDtype = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        help="int8 or fp8: keys and values in eight bits, so that memory holds twice as many; "
        "answers differ. On a CPU, fp8 only rounds them, to see by how much. [default: auto]",
        rich_help_panel=_ENGINE,
        show_default=False,
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="The same answers to the last bit whatever the windows, threads and memory; "
        "prefixes are shared in multiples of 64 tokens only.",
        rich_help_panel=_ENGINE,
    ),
]
Policy = Annotated[
    str,
    typer.Option(
        help="Order: auto, ratio, dfs, dual-scan, table-order; or streaming, "
        "which plans nothing (to compare with).",
        rich_help_panel=_ENGINE,
    ),
]
Sharing = Annotated[
    bool,
    typer.Option(
        "--sharing/--no-sharing", help="Compute shared prefixes once.", rich_help_panel=_ENGINE
    ),
]
Overlap = Annotated[
    bool,
    typer.Option(
        "--overlap/--no-overlap",
        help="On a GPU, attend to one half of a step beside the products of the other, where "
        "that is faster.",
        rich_help_panel=_ENGINE,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu or cuda; auto is a GPU where torch can use one.", rich_help_panel=_ENGINE
    ),
]
AttentionBackendName = Annotated[
    str,
    typer.Option(
        "--attention-backend",
        help="auto, or by name: native, torch or reference on a CPU; cuda, flashinfer, "
        "mixed (of both), flashinfer-flat or reference on a GPU.",
        rich_help_panel=_ENGINE,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        help="How many compute. [default: OMP_NUM_THREADS, else one a core]",
        rich_help_panel=_ENGINE,
    ),
]
KvMemory = Annotated[
    str | None,
    typer.Option(
        help="KV cache size, like 4GiB. [default: half of what is free, on a GPU nearly all]",
        rich_help_panel=_ENGINE,
    ),
]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        help="Processes, one a GPU, that share a model; must divide its key-value heads.",
        rich_help_panel=_ENGINE,
    ),
]
DataParallelSize = Annotated[
    int,
    typer.Option(
        help="Replicas of the model that share the rows, a process each.", rich_help_panel=_ENGINE
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        help="Prompt and answer together, in tokens. [default: the model's]",
        rich_help_panel=_ENGINE,
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(help="Most rows at once. [default: 1024, on a GPU 4096]", rich_help_panel=_ENGINE),
]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(
        help="Most tokens in a step. [default: 2048, on a GPU 8192]", rich_help_panel=_ENGINE
    ),
]
MaxErrors = Annotated[
    str | None,
    typer.Option(
        metavar="N|P%", help="More failed rows than this: exit code 3.", rich_help_panel=_FAILURES
    ),
]
OnError = Annotated[
    str,
    typer.Option(
        help="continue: a failed row has an error, the others go on. stop: stop as soon as more "
        "rows failed than --max-errors (without it, one).",
        rich_help_panel=_FAILURES,
    ),
]
RetryFailed = Annotated[
    bool,
    typer.Option(
        "--retry-failed", help="Answer rows again that have an error.", rich_help_panel=_FAILURES
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Delete an OUTPUT of batchllm's that is complete or another job's.",
        rich_help_panel=_FAILURES,
    ),
]
Summary = Annotated[Path | None, typer.Option(help="Write the summary here, as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
AnswerTokens = Annotated[
    int, typer.Option(help="How long an answer is, in tokens.", rich_help_panel=_SIMULATION)
]
Simulate = Annotated[
    bool,
    typer.Option(
        "--simulate", help="Estimate the time under each policy.", rich_help_panel=_SIMULATION
    ),
]
MachineName = Annotated[
    str, typer.Option(help="cpu (this one), a100, h100 or h200.", rich_help_panel=_SIMULATION)
]
ModelShapeName = Annotated[
    str | None,
    typer.Option(
        help="Sizes of another model, like llama-3.1-8b. [default: --model's]",
        rich_help_panel=_SIMULATION,
    ),
]
MachineKvMemory = Annotated[
    str | None,
    typer.Option(
        help="KV cache size, like 4GiB. [default: what the machine has]",
        rich_help_panel=_SIMULATION,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def template_text(template: str | None) -> str | None:
    """A template's text; `@FILE` reads it from a file.

    Raises:
        UsageError: the file cannot be read.
    """
    if template is None or not template.startswith("@"):
        return template
    try:
        return Path(template[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"template {template[1:]}: {reason}") from error
