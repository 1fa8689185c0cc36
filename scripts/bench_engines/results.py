"""Runs of several engines over several rounds, brought down to one line an engine and shape.

Seconds are medians over the rounds. Ratios are taken within each round, between neighbours in
time, and then their median: what slows the machine for a while slows both sides of a ratio.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from bench_engines.contract import EngineReport

OURS = "batchllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One engine's run of one shape in one round, and the bounds at that round's rates."""

    shape: str
    round: int
    report: EngineReport
    bound_overlap: float
    bound_total: float

    @property
    def label(self) -> str:
        order = self.report.order
        return self.report.engine + ("" if order == "shuffled" else f" ({order})")

    @property
    def tokens(self) -> int:
        return self.report.prompt_tokens + self.report.output_tokens

    @property
    def whole_seconds(self) -> float:
        return self.report.load_seconds + self.report.engine_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table. Ratios are our seconds over theirs (under 1: we are faster)."""

    shape: str
    label: str
    rounds: int
    engine_seconds: float
    load_seconds: float
    tokens_per_second: float
    ratio: float | None
    ratio_with_load: float | None
    overlap_share: float
    total_share: float


def summarise(runs: Sequence[Run]) -> list[Line]:
    """One line for each shape, in the order in which they ran, and engine, ours first."""
    lines = []
    for shape in dict.fromkeys(run.shape for run in runs):
        labels = {run.label for run in runs if run.shape == shape}
        ranked = sorted(labels, key=lambda label: (label != OURS, label))
        lines += [_line(runs, shape, label) for label in ranked]
    return lines


def markdown(lines: Iterable[Line]) -> str:
    """The lines as a table."""
    head = (
        "shape",
        "engine",
        "engine s",
        "load s",
        "tokens/s",
        "ours ÷ its",
        "with load",
        "share of T_opt",
        "without overlap",
    )
    table = [_row(head), _row(["---", "---"] + ["---:"] * (len(head) - 2))]
    table += [
        _row(
            (
                line.shape,
                line.label,
                f"{line.engine_seconds:.2f}",
                f"{line.load_seconds:.1f}",
                f"{line.tokens_per_second:,.0f}",
                _ratio(line.ratio),
                _ratio(line.ratio_with_load),
                f"{line.overlap_share:.1%}",
                f"{line.total_share:.1%}",
            )
        )
        for line in lines
    ]
    return "\n".join(table)


def _line(runs: Sequence[Run], shape: str, label: str) -> Line:
    its = [run for run in runs if (run.shape, run.label) == (shape, label)]
    seconds = median(run.report.engine_seconds for run in its)
    ours = {run.round: run for run in runs if (run.shape, run.label) == (shape, OURS)}
    pairs = [(ours[run.round], run) for run in its if run.round in ours and label != OURS]
    return Line(
        shape=shape,
        label=label,
        rounds=len(its),
        engine_seconds=seconds,
        load_seconds=median(run.report.load_seconds for run in its),
        tokens_per_second=its[0].tokens / seconds,
        ratio=_median_ratio(pairs, lambda run: run.report.engine_seconds),
        ratio_with_load=_median_ratio(pairs, lambda run: run.whole_seconds),
        overlap_share=median(run.bound_overlap / run.report.engine_seconds for run in its),
        total_share=median(run.bound_total / run.report.engine_seconds for run in its),
    )


def _median_ratio(
    pairs: Sequence[tuple[Run, Run]], seconds: Callable[[Run], float]
) -> float | None:
    return median(seconds(ours) / seconds(its) for ours, its in pairs) if pairs else None


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
