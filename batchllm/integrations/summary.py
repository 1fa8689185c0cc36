"""What all partitions of a call took, as one summary."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from batchllm.integrations.held import Loaded
from batchllm.metrics import Metrics
from batchllm.request import TokenIds


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """What one partition took; of two runs of one partition, either will do.

    `first` and `last` are the first and the last of its prompts by their keys, None without rows;
    prefixes are shared in multiples of `granularity` tokens.
    """

    partition: int
    metrics: Metrics
    loaded: Loaded | None
    first: TokenIds | None
    last: TokenIds | None
    granularity: int
    seconds: float


@dataclass(slots=True)
class Summary:
    """Of a call of `generate`: hand one in, and read it when the answers are there.

    Attributes:
        partitions: the reports so far, by partition; one that ran twice is here once.
        expected: what partitioning said beforehand, for the whole table.
    """

    partitions: dict[int, PartitionReport] = field(default_factory=dict)
    expected: "Expected | None" = None

    def add(self, reports: Iterable[PartitionReport]) -> None:
        """Take reports in; those of partitions that have one already are left out."""
        for report in reports:
            self.partitions.setdefault(report.partition, report)

    def clear(self) -> None:
        """Forget everything, for the next call."""
        self.partitions.clear()
        self.expected = None

    @property
    def metrics(self) -> Metrics:
        """All counts and seconds; seconds of workers side by side add up."""
        total = Metrics()
        for report in self.partitions.values():
            total.add(report.metrics)
        return total

    @property
    def model_loads(self) -> int:
        """How often a model was loaded for this call's answers, on all workers."""
        return len({report.loaded for report in self.partitions.values() if report.loaded})

    @property
    def workers(self) -> int:
        """How many processes answered."""
        loads = (report.loaded for report in self.partitions.values())
        return len({(one.host, one.process) for one in loads if one})

    @property
    def partition_repeated_tokens(self) -> int:
        """Prompt tokens computed once more because partitions part rows that share them."""
        reports = [self.partitions[number] for number in sorted(self.partitions)]
        pairs = pairwise(report for report in reports if report.first is not None)
        return sum(common_tokens(a.last, b.first, b.granularity) for a, b in pairs)

    @property
    def computed_alone(self) -> int:
        """Prompt tokens that one engine would compute that planned the whole table at once."""
        metrics = self.metrics
        repeated = metrics.window_repeated_tokens + self.partition_repeated_tokens
        return metrics.computed_prompt_tokens - repeated

    @property
    def lost_share(self) -> float:
        """What partitions and windows compute once more, of what they compute, 0 to 1."""
        computed = self.metrics.computed_prompt_tokens
        return 1 - self.computed_alone / computed if computed else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            **self.metrics.as_dict(),
            "partitions": len(self.partitions),
            "workers": self.workers,
            "model_loads": self.model_loads,
            "partition_repeated_tokens": self.partition_repeated_tokens,
            "lost_share": round(self.lost_share, 6),
        }

    def __str__(self) -> str:
        """A few lines to read."""
        m = self.metrics
        lines = [
            f"{m.rows:,} rows, {m.failed:,} failed, in {len(self.partitions):,} partitions on "
            f"{self.workers:,} workers ({self.model_loads:,} model loads)",
            f"{m.prompt_tokens:,} prompt tokens, {m.computed_prompt_tokens:,} computed "
            f"({m.saved_share:.1%} saved); {self.lost_share:.2%} of those would not have been "
            "by one engine",
            f"{m.output_tokens:,} output tokens",
        ]
        if self.expected is not None:
            lines.append(self.expected.as_text())
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Expected:
    """What partitioning said beforehand.

    Attributes:
        seconds: about what each partition takes, by the cost model.
        repeated_tokens: about what partitions compute once more.
        computed_tokens: about what one engine would compute.
    """

    seconds: tuple[float, ...]
    repeated_tokens: float
    computed_tokens: float

    def as_text(self) -> str:
        """In a line."""
        share = self.repeated_tokens / max(self.computed_tokens + self.repeated_tokens, 1)
        return (
            f"expected: {len(self.seconds):,} partitions of "
            f"{min(self.seconds, default=0):.3g} to {max(self.seconds, default=0):.3g} s, "
            f"{share:.2%} of their prompt tokens computed twice"
        )


def common_tokens(left: TokenIds | None, right: TokenIds | None, granularity: int = 1) -> int:
    """How many tokens two prompts share at their beginnings, as far as an engine shares them."""
    if left is None or right is None:
        return 0
    size = min(len(left), len(right))
    differ = np.flatnonzero(left[:size] != right[:size])
    if len(differ) == 0 and len(left) == len(right):
        return size  # a duplicate, which has nothing of its own
    common = int(differ[0]) if len(differ) else max(size - 1, 0)  # a last token is a prompt's own
    return common // granularity * granularity
