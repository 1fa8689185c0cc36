"""What sharing a table has, found without loading a model's weights."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from batchllm.prefix.plan import PrefixGroup, biggest_groups
from batchllm.prefix.tree import Ints, build_tree
from batchllm.progress import duration
from batchllm.report.advice import advise
from batchllm.report.bars import by_powers
from batchllm.report.lru import LRUReplay
from batchllm.report.prompts import Prompts
from batchllm.request import RaggedTokens
from batchllm.text.prompts import PromptBuilder, PromptSpec
from batchllm.text.tokenizer import Tokenizer

HEAD_ROWS = 20_000  # that an LRU cache and the fields' order are judged by
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
    `errors` counts failed rows by code. `saved_by_rows` and `saved_by_depth` are the tokens that
    shared prefixes save, by the power of two at or below how many rows share one, or the position
    where it ends. `window_repeated_tokens` are those of prefixes that several windows share and
    each of them computes. `lru_saved_share` is what an LRU cache of `lru_kv_tokens` would have
    saved.
    """

    rows: int = 0
    windows: int = 0
    duplicate_rows: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    distinct_prefixes: int = 0
    window_repeated_tokens: int = 0
    longest_prompt: int = 0
    output_tokens: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    prefixes: list[SharedPrefix] = field(default_factory=list)
    saved_by_rows: dict[int, int] = field(default_factory=dict)
    saved_by_depth: dict[int, int] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)
    expected_seconds: float | None = None
    machine: str = "this machine"
    lru_saved_share: float | None = None
    lru_kv_tokens: int | None = None

    @property
    def saved_share(self) -> float:
        """Share of prompt tokens that sharing saves, 0 to 1."""
        return 1 - self.computed_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def window_lost_share(self) -> float:
        """Share that windows lose of what planning the whole table at once would save, 0 to 1."""
        saved = self.prompt_tokens - self.computed_tokens
        return self.window_repeated_tokens / max(saved + self.window_repeated_tokens, 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        shares = ("saved_share", "window_lost_share")
        return {**asdict(self), **{name: round(getattr(self, name), 6) for name in shares}}

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
        ]
        if self.windows > 1:
            lines.append(
                f"  lost to windows  {self.window_lost_share:>14.2%}  of what the whole table "
                f"shares, by planning it in {self.windows:,} windows"
            )
        if self.lru_saved_share is not None:
            lines.append(
                f"  by an LRU cache  {self.lru_saved_share:>14.1%}  in table order, "
                f"with KV memory for {self.lru_kv_tokens:,} tokens"
            )
        lines.append(f"longest prompt     {self.longest_prompt:>14,}")
        if self.expected_seconds is not None:
            lines.append(
                f"expected time      {duration(self.expected_seconds):>14}  "
                f"on {self.machine}, for answers of "
                f"{self.output_tokens / max(self.rows, 1):,.0f} tokens"
            )
        if self.prefixes:
            lines += ["", "prefixes that save most"]
            lines += [
                f"  {p.saved_tokens:>12,} tokens saved: {p.num_rows:,} rows share "
                f"{p.num_tokens:,} tokens ending …{p.text!r}"
                for p in self.prefixes
            ]
        for title, unit, amounts in (
            ("saved tokens, by how many rows share a prefix", "rows  ", self.saved_by_rows),
            ("saved tokens, by where the shared prefix ends", "tokens", self.saved_by_depth),
        ):
            if chart := by_powers(title, unit, amounts):
                lines += ["", *chart]
        if self.advice:
            lines += ["", *(f"advice: {text}" for text in self.advice)]
        return "\n".join(lines)


def read_prompts(
    tables: Iterable[pa.Table], builder: PromptBuilder, max_tokens: int, report: PlanReport
) -> Iterator[Prompts]:
    """Make each window's prompts, counting its rows and its bad ones in `report`.

    `max_tokens` is how long an answer is where no column says.
    """
    for table in tables:
        batch = builder.build(table)
        report.rows += table.num_rows
        report.windows += 1
        for error in batch.errors.values():
            report.errors[error.code] = report.errors.get(error.code, 0) + 1
        good = np.flatnonzero(batch.tokens.lengths)
        if len(good) == 0:
            continue
        tokens = RaggedTokens.from_sequences([batch.tokens[row] for row in good.tolist()])
        outputs = np.full(len(good), max_tokens, dtype=np.int64)
        if batch.max_tokens is not None:
            outputs = batch.max_tokens[good].astype(np.int64)
        yield Prompts(tokens, outputs)


def add_window(report: PlanReport, prompts: Prompts, tokenizer: Tokenizer, *, top: int = 5) -> None:
    """Plan a window as a greedy run would, and add it up."""
    tree = build_tree(prompts.tokens, prompts.output_tokens)
    report.duplicate_rows += tree.num_rows - tree.num_leaves
    report.prompt_tokens += int(prompts.tokens.lengths.sum())
    report.output_tokens += int(prompts.output_tokens.sum())
    report.computed_tokens += tree.num_tokens
    report.distinct_prefixes += tree.num_distinct_prefixes
    report.longest_prompt = max(report.longest_prompt, int(prompts.tokens.lengths.max()))
    rows = tree.row_offsets[tree.node_leaf_end] - tree.row_offsets[tree.node_leaf_begin]
    saved = (rows - 1) * (tree.node_end - tree.node_start)
    _add_by_power(report.saved_by_rows, rows, saved)
    _add_by_power(report.saved_by_depth, tree.node_end, saved)
    report.prefixes += [
        _show(group, prompts.tokens[group.example_row], tokenizer)
        for group in biggest_groups(tree, top)
    ]
    report.prefixes = sorted(report.prefixes, key=lambda p: -p.saved_tokens)[:top]


def report_plan(
    tables: Iterable[pa.Table],
    builder: PromptBuilder,
    tokenizer: Tokenizer,
    *,
    max_tokens: int = 256,
    kv_tokens: int | None = None,
    spec: PromptSpec | None = None,
    head: pa.Table | None = None,
    expect: Callable[[Prompts], float] | None = None,
    also: Callable[[Prompts], None] = lambda prompts: None,
) -> PlanReport:
    """Plan each window's table and add the windows up.

    Args:
        tables: the windows.
        builder: makes their prompts.
        tokenizer: shows shared prefixes as text.
        max_tokens: how long an answer is where no column says.
        kv_tokens: the size of an LRU cache to compare with.
        spec: what prompts are made of, for advice on that.
        head: the first rows in the table's order, which the cache and the fields' order are judged
            by; None where the first window is that.
        expect: how many seconds a window's prompts take.
        also: sees each window's prompts.
    """
    report = PlanReport(lru_kv_tokens=kv_tokens)
    replay = None if kv_tokens is None else LRUReplay(kv_tokens)

    def advised() -> Iterator[pa.Table]:
        for table in tables:
            if not report.windows and spec is not None:
                report.advice = advise(table if head is None else head, spec)
            yield table

    if replay is not None and head is not None:
        for prompts in read_prompts([head], builder, max_tokens, PlanReport()):
            replay.add(prompts.tokens)
    for prompts in read_prompts(advised(), builder, max_tokens, report):
        add_window(report, prompts, tokenizer)
        if expect is not None:
            report.expected_seconds = (report.expected_seconds or 0.0) + expect(prompts)
        if replay is not None and head is None:
            replay.add(prompts.tokens)
        also(prompts)
    if replay is not None:
        report.lru_saved_share = replay.saved_share
    return report


def _add_by_power(amounts: dict[int, int], sizes: Ints, saved: Ints) -> None:
    powers = np.floor(np.log2(np.maximum(sizes, 1))).astype(np.int64)
    for power, amount in enumerate(np.bincount(powers, weights=saved).tolist()):
        if amount:
            amounts[power] = amounts.get(power, 0) + int(amount)


def _show(group: PrefixGroup, prompt: np.ndarray[Any, Any], tokenizer: Tokenizer) -> SharedPrefix:
    ending = prompt[max(0, group.depth - _TEXT_TOKENS) : group.depth]
    text = " ".join(tokenizer.decode_batch([ending])[0].split())
    return SharedPrefix(
        group.depth, group.num_tokens, group.num_rows, group.saved_tokens, text[-100:]
    )
