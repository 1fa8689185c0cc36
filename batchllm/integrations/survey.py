"""The driver's part: from rows sampled to fine ranges, and from what they hold to partitions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from batchllm.integrations.call import GenerateCall
from batchllm.integrations.passes import Ranges, Sample, answer_lengths, builder_of
from batchllm.integrations.summary import Expected
from batchllm.models.checkpoint import Checkpoint
from batchllm.prefix.balance import Partitions, TokenRate, choose_partitions, graded_shares
from batchllm.prefix.divide import Floats, Rates
from batchllm.prefix.partition import choose_ranges
from batchllm.prefix.tally import CHUNK, Tally
from batchllm.runner.choose_device import choose_device
from batchllm.simulate.cost import CostModel
from batchllm.simulate.machine import get_machine
from batchllm.simulate.saved import this_machine
from batchllm.simulate.shape import shape_of
from batchllm.text.field_order import learn_field_order
from batchllm.text.prompts import PromptBuilder

_SAMPLE_ROWS = 16_384  # of the whole table, at least
_SAMPLE_BYTES = 256 << 20  # of their keys
_RANGES_EACH = 16  # fine ranges for each partition, at least
_SAMPLE_EACH = 8  # sampled rows for each fine range, at least
_PREFIXES = 1 << 20  # that are counted, about
_TOKENIZED_ROWS = 512  # by which it is told how many tokens a byte makes


@dataclass(frozen=True, slots=True)
class Survey:
    """A table that was looked at.

    `num_rows` is of all of it; `shares` are the relative sizes its partitions are to have.
    """

    ranges: Ranges
    tokens: TokenRate
    rates: Rates
    shares: Floats

    @property
    def num_rows(self) -> int:
        return int(self.ranges.first_row[-1])

    def partitions(self, tallies: Sequence[Tally]) -> Partitions:
        """The fine ranges, counted, as partitions."""
        return choose_partitions(Tally.merge(tallies), self.tokens, self.rates, self.shares)


def sample_size(num_partitions: int, workers: int, window_rows: int) -> int:
    """How many rows to sample of each of so many input partitions."""
    most = len(graded_shares(workers, 1 << 62)) * _RANGES_EACH * _SAMPLE_EACH
    return max(-(-max(_SAMPLE_ROWS, most) // max(num_partitions, 1)), 16)


def survey(
    call: GenerateCall,
    samples: Sequence[Sample],
    workers: int,
    *,
    num_partitions: int | None = None,
    machine: str | None = None,
) -> Survey:
    """Look at a table.

    Args:
        call: what is to be generated.
        samples: of its partitions, in order.
        workers: how many will answer side by side.
        num_partitions: how many to make, all alike; None is what suits the workers.
        machine: what a worker is like, by its name in `simulate`; None is like this one.

    Raises:
        BatchLLMError: the model cannot be opened, or makes no prompts of this table.
    """
    first_row = np.cumsum([0, *(sample.num_rows for sample in samples)])
    num_rows = int(first_row[-1])
    tables = [sample.rows for sample in samples if sample.rows.num_rows]
    rows = pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})
    rules = learn_field_order(call.spec, tables, rows.num_rows)
    call = replace(call, field_rules=rules)
    checkpoint = call.model.open()
    builder = builder_of(call, checkpoint)
    keys = [key or b"" for key in builder.keys(rows)] if rows.num_rows else []
    shares = graded_shares(workers, num_rows) if num_partitions is None else np.ones(num_partitions)
    count = max(_RANGES_EACH * len(shares), 4 * num_rows // call.window_rows)
    weights = np.concatenate(
        [np.full(s.rows.num_rows, s.num_rows / max(s.rows.num_rows, 1)) for s in samples]
        or [np.zeros(0)]
    )
    every = 1 + sum(map(len, keys)) // _SAMPLE_BYTES  # long prompts: fewer will do
    ranges = choose_ranges(keys[::every], weights[::every], count if len(keys) > every else 1)
    bytes_each = sum(map(len, keys)) / max(len(keys), 1)
    prefixes = num_rows * (bytes_each / CHUNK + 1)
    outputs = int(answer_lengths(call, rows).mean()) if rows.num_rows else 1
    return Survey(
        Ranges(call, ranges, min(_PREFIXES / max(prefixes, 1), 1.0), first_row),
        _token_rate(builder, rows, keys),
        _rates(call, checkpoint, machine, outputs, num_rows // len(shares)),
        shares,
    )


def expected(partitions: Partitions) -> Expected:
    """What partitioning says beforehand, for a summary."""
    return Expected(
        tuple(partitions.seconds.tolist()), partitions.repeated_tokens, partitions.computed_tokens
    )


def _token_rate(builder: PromptBuilder, rows: pa.Table, keys: list[bytes]) -> TokenRate:
    """By a few rows: tokens a byte, and those that all prompts begin with (a system message)."""
    if not keys:
        return TokenRate(0.0, 1.0)
    some = np.unique(np.linspace(0, len(keys) - 1, _TOKENIZED_ROWS).astype(np.int64))
    tokens = builder.build(rows.take(pa.array(some))).tokens.lengths
    sizes = np.array([len(keys[place]) for place in some])
    fine = tokens > 0
    if not fine.any():
        return TokenRate(0.0, 1.0)
    tokens, sizes = tokens[fine], sizes[fine]
    whole = float(tokens.mean() / max(sizes.mean(), 1))
    spread = float(sizes.var())
    if spread == 0:
        return TokenRate(0.0, whole)
    slope = float(((sizes - sizes.mean()) * (tokens - tokens.mean())).mean() / spread)
    head = float(tokens.mean() - slope * sizes.mean())
    return TokenRate(head, slope) if slope > 0 and head > 0 else TokenRate(0.0, whole)


def _rates(
    call: GenerateCall, checkpoint: Checkpoint, machine: str | None, outputs: int, rows_each: int
) -> Rates:
    """What prompts and answers cost on a worker."""
    device = choose_device(call.config.device)
    like = this_machine() if machine is None else get_machine(machine)
    costs = CostModel(like, shape_of(checkpoint.config, "bfloat16"))
    step = call.config.step_limits(device)
    decodes = max(min(step.max_num_seqs, rows_each), 1)
    return costs.rates(step.max_num_batched_tokens, decodes)
