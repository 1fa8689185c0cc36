"""What sharing a table has, found without loading a model's weights."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from batchllm.prefix.plan import PrefixGroup, biggest_groups
from batchllm.prefix.tree import build_tree
from batchllm.text.prompts import PromptBuilder
from batchllm.text.tokenizer import Tokenizer

_TEXT_TOKENS = 60


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """A shared prefix to show: where it ends, who has it, what it saves, how it ends in text."""

    depth: int
    num_tokens: int
    num_rows: int
    saved_tokens: int
    text: str


@dataclass(slots=True)
class PlanReport:
    """Counts over all windows. Tokens are prompt tokens.

    `computed_tokens` is what a run computes; `distinct_prefixes` what it could not go below;
    `errors` counts failed rows by code.
    """

    rows: int = 0
    windows: int = 0
    duplicate_rows: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    distinct_prefixes: int = 0
    longest_prompt: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    prefixes: list[SharedPrefix] = field(default_factory=list)

    @property
    def saved_share(self) -> float:
        """Share of prompt tokens that sharing saves, 0 to 1."""
        return 1 - self.computed_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "saved_share": round(self.saved_share, 6)}

    def as_text(self) -> str:
        """The page a person reads."""
        lines = [
            f"rows               {self.rows:>14,}",
            f"  failing          {sum(self.errors.values()):>14,}"
            + "".join(f"  {code}: {count:,}" for code, count in sorted(self.errors.items())),
            f"  duplicates       {self.duplicate_rows:>14,}",
            f"prompt tokens      {self.prompt_tokens:>14,}",
            f"  distinct         {self.distinct_prefixes:>14,}",
            f"  to compute       {self.computed_tokens:>14,}",
            f"  saved            {self.saved_share:>14.1%}",
            f"longest prompt     {self.longest_prompt:>14,}",
        ]
        if self.prefixes:
            lines += ["", "prefixes that save most"]
            lines += [
                f"  {p.saved_tokens:>12,} tokens saved: {p.num_rows:,} rows share "
                f"{p.num_tokens:,} tokens ending …{p.text!r}"
                for p in self.prefixes
            ]
        return "\n".join(lines)


def report_plan(
    tables: Iterable[pa.Table], builder: PromptBuilder, tokenizer: Tokenizer, *, top: int = 5
) -> PlanReport:
    """Plan each window's table as a greedy run would, and add the windows up."""
    report = PlanReport()
    for table in tables:
        batch = builder.build(table)
        good = np.flatnonzero(batch.tokens.lengths)
        report.rows += table.num_rows
        report.windows += 1
        for error in batch.errors.values():
            report.errors[error.code] = report.errors.get(error.code, 0) + 1
        if len(good) == 0:
            continue
        tokens = type(batch.tokens).from_sequences([batch.tokens[row] for row in good.tolist()])
        keys = np.zeros(len(good), np.int64)
        if batch.max_tokens is not None:
            keys = batch.max_tokens[good].astype(np.int64)
        tree = build_tree(tokens, keys)
        report.duplicate_rows += tree.num_rows - tree.num_leaves
        report.prompt_tokens += int(tokens.lengths.sum())
        report.computed_tokens += tree.num_tokens
        report.distinct_prefixes += tree.num_distinct_prefixes
        report.longest_prompt = max(report.longest_prompt, int(tokens.lengths.max()))
        report.prefixes += [
            _show(group, tokens[group.example_row], tokenizer)
            for group in biggest_groups(tree, top)
        ]
    report.prefixes = sorted(report.prefixes, key=lambda p: -p.saved_tokens)[:top]
    return report


def _show(group: PrefixGroup, prompt: np.ndarray[Any, Any], tokenizer: Tokenizer) -> SharedPrefix:
    ending = prompt[max(0, group.depth - _TEXT_TOKENS) : group.depth]
    text = " ".join(tokenizer.decode_batch([ending])[0].split())
    return SharedPrefix(
        group.depth, group.num_tokens, group.num_rows, group.saved_tokens, text[-100:]
    )
