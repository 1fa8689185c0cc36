"""The ladder's workloads: each is made once into a Parquet file that contract.Rows reads.

Every engine gets the same token ids, in a seeded random order, and answers every row for exactly
`max_tokens` tokens. Texts are tokenized as `batchllm run` would, chat template and all. A workload
is a sample small enough that a slow engine needs a minute or so on two cores; whole groups are
sampled, so that what the rows share is what they share in the full table.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from bench_engines.contract import ORDERS

from batchllm.models.checkpoint import open_checkpoint
from batchllm.text.prompts import PromptBuilder, PromptSpec

ROOT = Path(__file__).resolve().parents[2]
# At the end, and no package: so that it hides no library (datasets/README.md).
sys.path.append(str(ROOT / "datasets"))
import documents  # noqa: E402
import fewshot  # noqa: E402
import lengths  # noqa: E402
import micro  # noqa: E402
import tools  # noqa: E402

RECIPE = b"recipe"


class WorkloadError(Exception):
    """A workload cannot be made; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Micro:
    """Random token ids in groups that share a prefix."""

    shape: micro.MicroShape

    def build(self, data: Path, model: Path) -> pa.Table:
        return micro.build(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Random token ids, as long as the first `rows` of a trace, and `sharing` of them shared.

    Prompts and answers are cut to at most so many tokens: one answer of thousands of tokens would
    be all that the run's last minutes are about.
    """

    trace: str
    sharing: float
    rows: int
    longest_prompt: int
    longest_output: int

    def build(self, data: Path, model: Path) -> pa.Table:
        return lengths.build(
            self.trace,
            sharing=self.sharing,
            rows=self.rows,
            longest_prompt=self.longest_prompt,
            longest_output=self.longest_output,
        )


@dataclass(frozen=True, slots=True)
class Texts:
    """A sample of a text table of scripts/text_workloads.sh: all rows of `groups` drawn groups.

    Rows of one group have equal values in `group`'s column.
    """

    table: str
    template: str
    group: str
    groups: int
    seed: int = 0

    def build(self, data: Path, model: Path) -> pa.Table:
        """Tokenizes the sample; rows that the model cannot take are left out, and counted."""
        path = data / f"{self.table}.parquet"
        if not path.exists():
            raise WorkloadError(f"{path} is not there; run scripts/text_workloads.sh first")
        sample = sample_groups(pq.read_table(path), self.group, self.groups, self.seed)
        return tokenized(sample, self.template, model)


Recipe = Micro | Lengths | Texts


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One line of the ladder.

    `in_shared_mean`: its rows share prefixes, and the engines get them in both orders.
    """

    name: str
    recipe: Recipe
    in_shared_mean: bool = True
    orders: tuple[str, ...] = ORDERS

    def make(self, data: Path, model: Path) -> Path:
        """Makes the Parquet file below `data`, or keeps the one of the same recipe."""
        path = data / f"ladder-{self.name}.parquet"
        recipe = repr(self.recipe).encode()
        if path.exists() and (pq.read_schema(path).metadata or {}).get(RECIPE) == recipe:
            return path
        table = self.recipe.build(data, model).select(["token_ids", "max_tokens"])
        data.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        pq.write_table(table.replace_schema_metadata({RECIPE: recipe}), unfinished)
        unfinished.replace(path)
        return path


def sample_groups(table: pa.Table, column: str, groups: int, seed: int) -> pa.Table:
    """All rows of `groups` values of `column`, drawn at random; rows keep their order.

    Raises:
        WorkloadError: there are fewer values.
    """
    values = np.array(sorted(set(table[column].to_pylist())), dtype=object)
    if groups > len(values):
        raise WorkloadError(f"{column} has {len(values)} groups, not {groups}")
    drawn = np.random.default_rng(seed).permutation(len(values))[:groups]
    return table.filter(pc.is_in(table[column], pa.array(values[drawn].tolist())))


def tokenized(table: pa.Table, template: str, model: Path) -> pa.Table:
    """The table's prompts as token ids, in its order, without rows that are no prompt.

    A prompt that leaves no room for its answer in the model's context is left out too.
    """
    checkpoint = open_checkpoint(model)
    room = checkpoint.config.max_position_embeddings
    spec = PromptSpec(template=template, max_tokens_column="max_tokens")
    batch = PromptBuilder(spec, checkpoint.tokenizer(), room).build(table)
    assert batch.max_tokens is not None
    fits = batch.tokens.lengths + batch.max_tokens <= room
    kept = [row for row in np.flatnonzero(fits).tolist() if row not in batch.errors]
    if len(kept) < len(table):
        dropped = len(table) - len(kept)
        print(f"bench: {dropped} rows left out, too long for {room:,} tokens", file=sys.stderr)
    prompts = [batch.tokens[row] for row in kept]
    return micro.token_table(
        np.concatenate(prompts), np.array([len(p) for p in prompts]), batch.max_tokens[kept]
    )


def _by_name(*workloads: Workload) -> dict[str, Workload]:
    return {workload.name: workload for workload in workloads}


WORKLOADS = _by_name(
    Workload(name="8x32", recipe=Micro(micro.SHAPES["8x32"])),
    Workload(name="4x16", recipe=Micro(micro.SHAPES["4x16"])),
    Workload(name="256x1", recipe=Micro(micro.SHAPES["256x1"]), in_shared_mean=False),
    Workload(name="tools", recipe=Texts("tools", tools.TEMPLATE, "functions", groups=40)),
    Workload(name="fewshot", recipe=Texts("fewshot", fewshot.TEMPLATE, "head", groups=4)),
    Workload(name="documents", recipe=Texts("documents", documents.TEMPLATE, "document", groups=4)),
    Workload(
        name="lengths",
        recipe=Lengths(
            trace="sharegpt", sharing=0.35, rows=64, longest_prompt=2048, longest_output=512
        ),
    ),
    # Prefixes of 204,800 tokens, 10 % more than the 186,368 that 4 GiB of KV hold for this model:
    # as rows come shuffled, a cache by last use has often lost a prefix when its next row comes.
    # Hardly more than must be, since every prefix token takes an engine half a millisecond here.
    # Shuffled only, as users have it: sorted, nothing overflows.
    Workload(
        name="overflow",
        recipe=Micro(micro.MicroShape(groups=185, members=3, prefix=1024, own=32, output=8)),
        in_shared_mean=False,
        orders=("shuffled",),
    ),
    # Not for timing: shows that an engine works.
    Workload(name="tiny", recipe=Micro(micro.SHAPES["tiny"]), in_shared_mean=False),
)
LADDER = [name for name in WORKLOADS if name != "tiny"]
