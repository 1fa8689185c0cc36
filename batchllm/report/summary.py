"""A run's summary as text."""

from collections.abc import Mapping
from typing import Any

from batchllm.progress import duration


def summary_text(summary: Mapping[str, Any]) -> str:
    """What a run did, in a few lines; reads a summary of any version that has these keys."""
    engine = float(summary["engine_seconds"])
    computed = int(summary["computed_prompt_tokens"]) + int(summary["computed_output_tokens"])
    lines = [
        f"rows            {summary['rows']:,}, failed {summary['failed']:,}, "
        f"duplicates {summary['duplicate_rows']:,}",
        f"prompt tokens   {summary['prompt_tokens']:,}, computed "
        f"{summary['computed_prompt_tokens']:,} ({float(summary['saved_share']):.1%} saved)",
        f"output tokens   {summary['output_tokens']:,}{_in_vain(summary)}",
        f"engine          {duration(engine)} in {summary['steps']:,} steps, "
        f"{computed / max(engine, 1e-9):,.0f} tokens/s computed",
        f"preemptions     {summary['preemptions']:,}, recomputed {summary['recomputed_tokens']:,} "
        f"tokens, peak KV {summary['peak_kv_blocks']:,} of {summary['num_kv_blocks']:,} blocks",
        f"model           {summary['model']} in {_kind(summary)}, loaded in "
        f"{float(summary['load_seconds']):.1f}s{_machine(summary)}",
        f"whole run       {duration(float(summary['wall_seconds']))}",
    ]
    if int(summary.get("windows", 0)) > 1:
        lost = f"{float(summary.get('window_lost_share', 0.0)):.2%}"
        lines.append(f"windows         {summary['windows']:,}, losing {lost} of what is shared")
    if int(summary.get("replicas", 1)) > 1:
        lost = f"{float(summary.get('division_lost_share', 0.0)):.2%}"
        lines.append(f"replicas        {summary['replicas']:,}, losing {lost} of what is shared")
    if summary.get("pool_shrinks"):
        lines.append(
            f"memory          ran out {summary['pool_shrinks']:,} times; less KV after that"
        )
    if summary.get("resumed_rows"):
        lines.append(f"resumed         after {summary['resumed_rows']:,} rows of an earlier run")
    return "\n".join(lines)


def _in_vain(summary: Mapping[str, Any]) -> str:
    """Empty where no step was planned before the one before it was over."""
    tokens = int(summary.get("vain_tokens", 0))
    return f", and {tokens:,} more computed in vain behind the ends of answers" if tokens else ""


def _kind(summary: Mapping[str, Any]) -> str:
    return " ".join(filter(None, [summary["dtype"], summary.get("quantization")]))


def _machine(summary: Mapping[str, Any]) -> str:
    """Empty where no model was loaded, or a version wrote it that did not say."""
    if not summary.get("threads"):
        return ""
    threads, memory = int(summary["threads"]), int(summary["kv_memory"])
    return f"; threads {threads:,}, KV memory {memory / 2**30:,.2f} GiB"
