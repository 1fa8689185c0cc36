"""Runs of several engines over several rounds, brought down to one line an engine and workload.

Seconds are medians over the rounds. A speed-up is a peer's seconds over ours, so above 1 we are
faster; it is taken within each round, between neighbours in time, and then the median of the
rounds': what slows the machine for a while slows both sides. Of a peer's row orders always the
one that was faster in that round counts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median

from bench_engines.contract import EngineReport

PEER = "vllm"  # whom the table's speed-ups are over


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One engine's run of one workload in one round, at that round's rates (FLOP/s, bytes/s).

    `in_shared_mean` tells whether the workload counts in the first of the geometric means;
    `distinct_tokens` are the prompt tokens left when every shared prefix is kept once.
    """

    workload: str
    in_shared_mean: bool
    round: int
    report: EngineReport
    distinct_tokens: int
    bound_overlap: float
    bound_total: float
    flops: float
    int8_flops: float
    bandwidth: float

    @property
    def label(self) -> str:
        return label(self.report.engine, self.report.order)

    @property
    def tokens(self) -> int:
        return self.report.prompt_tokens + self.report.output_tokens

    @property
    def engine_seconds(self) -> float:
        return self.report.engine_seconds

    @property
    def whole_seconds(self) -> float:
        """From the process's start to the end of this run, as if it had been its only one."""
        return self.report.load_seconds + self.report.engine_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Speedup:
    """The better of a peer's orders over one of our lines: engine only, and load included."""

    engine: float
    whole: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of the table; `over_peer` is None for the peer itself and where it did not run."""

    workload: str
    label: str
    rounds: int
    engine_seconds: float
    load_seconds: float
    tokens_per_second: float
    over_peer: Speedup | None
    overlap_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """Geometric means of our speed-ups over a peer, and over how many workloads they are."""

    ours: str
    peer: str
    over: str
    workloads: int
    speedup: Speedup


def label(engine: str, order: str) -> str:
    """What a line of the table is called."""
    return engine + ("" if order == "shuffled" else f", {order}")


def is_ours(engine: str) -> bool:
    """Whether an engine is a variant of batchllm, not a peer."""
    return engine.startswith("batchllm")


def speedup(runs: Sequence[Run], workload: str, ours: str, peer: str) -> Speedup | None:
    """The speed-up of the line labelled `ours` over the engine `peer`; None without a pair."""
    here = [run for run in runs if run.workload == workload]
    pairs = [
        (run, theirs)
        for run in here
        if run.label == ours
        and (theirs := [r for r in here if (r.report.engine, r.round) == (peer, run.round)])
    ]
    if not pairs:
        return None

    def ratio(seconds: Callable[[Run], float]) -> float:
        return median(min(map(seconds, theirs)) / seconds(run) for run, theirs in pairs)

    return Speedup(
        engine=ratio(lambda run: run.engine_seconds), whole=ratio(lambda run: run.whole_seconds)
    )


def summarise(runs: Sequence[Run]) -> list[Line]:
    """One line for each workload, in the order in which they ran, and engine, ours first."""
    lines = []
    for workload in dict.fromkeys(run.workload for run in runs):
        labels = {run.label for run in runs if run.workload == workload}
        ranked = sorted(labels, key=lambda label: (not is_ours(label), label))
        lines += [_line(runs, workload, label) for label in ranked]
    return lines


def means(runs: Sequence[Run]) -> list[Mean]:
    """Every variant of ours over every peer: on the shared workloads, then on all."""
    engines = sorted({run.report.engine for run in runs})
    found = []
    for ours in filter(is_ours, engines):
        for peer in (engine for engine in engines if not is_ours(engine)):
            shared = list(dict.fromkeys(run.workload for run in runs if run.in_shared_mean))
            everything = list(dict.fromkeys(run.workload for run in runs))
            for over, workloads in (("shared", shared), ("all", everything)):
                pairs = [speedup(runs, workload, ours, peer) for workload in workloads]
                if there := [pair for pair in pairs if pair is not None]:
                    mean = Speedup(
                        engine=geometric_mean(pair.engine for pair in there),
                        whole=geometric_mean(pair.whole for pair in there),
                    )
                    found.append(
                        Mean(ours=ours, peer=peer, over=over, workloads=len(there), speedup=mean)
                    )
    return found


def _line(runs: Sequence[Run], workload: str, label: str) -> Line:
    its = [run for run in runs if (run.workload, run.label) == (workload, label)]
    seconds = median(run.engine_seconds for run in its)
    is_peer = its[0].report.engine == PEER
    return Line(
        workload=workload,
        label=label,
        rounds=len(its),
        engine_seconds=seconds,
        load_seconds=median(run.report.load_seconds for run in its),
        tokens_per_second=its[0].tokens / seconds,
        over_peer=None if is_peer else speedup(runs, workload, label, PEER),
        overlap_share=median(run.bound_overlap / run.engine_seconds for run in its),
    )


def markdown(runs: Sequence[Run]) -> str:
    """The whole report: the table, the means, the workloads' sizes and the machine's rates."""
    parts = [_lines_table(summarise(runs)), _means_table(means(runs)), _sizes_table(runs)]
    return "\n\n".join([*(part for part in parts if part), _rates(runs)])


def _lines_table(lines: Iterable[Line]) -> str:
    head = (
        "workload",
        "engine",
        "engine s",
        "load s",
        "tokens/s",
        f"{PEER} ÷ it",
        "with load",
        "of T_opt",
    )
    rows = []
    before = ""
    for line in lines:
        rows.append(
            (
                line.workload if line.workload != before else "",
                line.label,
                f"{line.engine_seconds:.1f}",
                f"{line.load_seconds:.1f}",
                f"{line.tokens_per_second:,.0f}",
                *_speedup(line.over_peer),
                f"{line.overlap_share:.0%}",
            )
        )
        before = line.workload
    return _table(head, rows, text_columns=2)


def _means_table(found: Sequence[Mean]) -> str:
    if not found:
        return ""
    head = ("geometric mean of", "workloads", "engine", "with load")
    rows = [
        (f"{mean.peer} ÷ {mean.ours}", f"{mean.workloads}, {mean.over}", *_speedup(mean.speedup))
        for mean in found
    ]
    return _table(head, rows, text_columns=2)


def _sizes_table(runs: Sequence[Run]) -> str:
    head = ("workload", "rows", "prompt tokens", "distinct", "output tokens")
    sizes = {run.workload: run for run in reversed(runs)}
    rows = [
        (
            workload,
            f"{sizes[workload].report.rows:,}",
            f"{sizes[workload].report.prompt_tokens:,}",
            f"{sizes[workload].distinct_tokens:,}",
            f"{sizes[workload].report.output_tokens:,}",
        )
        for workload in dict.fromkeys(run.workload for run in runs)
    ]
    return _table(head, rows, text_columns=1)


def _rates(runs: Sequence[Run]) -> str:
    return (
        f"Rates, medians: bf16 {median(run.flops for run in runs) / 1e9:.0f} GFLOP/s, "
        f"int8 {median(run.int8_flops for run in runs) / 1e9:.0f} GOP/s, "
        f"memory {median(run.bandwidth for run in runs) / 1e9:.1f} GB/s; "
        f"rounds: {max(run.round for run in runs)}."
    )


def _speedup(value: Speedup | None) -> tuple[str, str]:
    return ("", "") if value is None else (f"{value.engine:.2f}", f"{value.whole:.2f}")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int) -> str:
    ruler = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ruler, *rows))
