"""Which rows are planned together: all of them where they fit, else those whose prompts are alike.

A table larger than a window is dealt out in two passes over the columns that prompts are made of:
the first looks at a sample of the rows and cuts the sorted order of prompts into ranges, the second
puts each row where its prompt belongs. What the cuts lose is counted, from the two rows on either
side of each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchllm.io.parquet import ParquetInput
from batchllm.io.rows import Rows
from batchllm.io.spool import Spool
from batchllm.prefix.partition import Ints, KeyRanges, choose_ranges
from batchllm.prefix.sorting import common_prefix_lengths
from batchllm.text.prompts import PromptBuilder

DEFAULT_WINDOW_ROWS = 65_536
_SAMPLE_ROWS = 16_384  # at least
_SAMPLE_PER_WINDOW = 64
_SAMPLE_BYTES = 256 * 1024 * 1024
_MASK_CHUNK = 1 << 20
# Of a window's keys: its texts, tokens and tree take a few times that.
_WINDOW_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Window:
    """Rows planned together, ascending.

    `repeated_tokens` are those of shared prefixes that an earlier window computes too, because
    windows part the rows that share them.
    """

    rows: Rows
    repeated_tokens: int


class Windows:
    """The windows of a job's rows, read one at a time.

    Args:
        source: the input.
        builder: makes its prompts.
        wanted: the rows to answer, [n] for the first n rows of the input.
        window_rows: about how many rows a window may have.
        scratch: a directory for what memory cannot hold.

    Attributes:
        count: how many windows there are; 0 with no rows.

    Raises:
        InputError: the input cannot be read.
        OutputError: the scratch directory cannot be written.
    """

    def __init__(
        self,
        source: ParquetInput,
        builder: PromptBuilder,
        wanted: NDArray[np.bool_],
        *,
        window_rows: int,
        scratch: Path,
    ) -> None:
        self._source = source
        self._builder = builder
        self._wanted = wanted
        self._columns = builder.columns_of(source.schema)
        self._spool: Spool | None = None
        self._repeated: Ints = np.zeros(1, dtype=np.int64)
        num_rows = int(wanted.sum())
        self.count = min(num_rows, 1)
        if num_rows > window_rows:
            ranges = self._choose(num_rows, window_rows)
            schema = pa.schema([source.schema.field(name) for name in self._columns])
            self._spool = Spool(scratch, schema, ranges.count)
            self._repeated = self._deal_out(ranges, self._spool)
            self.count = int((self._spool.counts > 0).sum())

    def __iter__(self) -> Iterator[Window]:
        if self._spool is not None:
            for window in np.flatnonzero(self._spool.counts).tolist():
                yield Window(self._spool.read(window), int(self._repeated[window]))
        elif self.count:
            yield Window(Rows.concat(list(self._source.read(self._wanted, self._columns))), 0)

    @property
    def repeated_tokens(self) -> int:
        """Of all windows."""
        return int(self._repeated.sum())

    def head(self, num_rows: int) -> pa.Table:
        """The first `num_rows` rows of the input, but for those not wanted, in its order."""
        return Rows.concat(list(self._source.read(self._wanted[:num_rows], self._columns))).table

    def close(self) -> None:
        """Give up the scratch directory."""
        if self._spool is not None:
            self._spool.close()

    def _choose(self, num_rows: int, window_rows: int) -> KeyRanges:
        """Ranges of prompts, as many as windows are needed, from a sample of the rows."""
        size = max(_SAMPLE_ROWS, _SAMPLE_PER_WINDOW * num_rows // window_rows)
        keys: list[bytes] = []
        num_bytes, seen, every = 0, 0, 1
        for rows in self._source.read(_sampled(self._wanted, size / num_rows), self._columns):
            more = [key or b"" for key in self._builder.keys(rows.table)]
            keys += (kept := more[-seen % every :: every])
            seen += len(more)
            num_bytes += sum(map(len, kept))
            while num_bytes > _SAMPLE_BYTES and len(keys) > 1:  # long prompts: fewer will do
                keys, every = keys[::2], 2 * every
                num_bytes = sum(map(len, keys))
        lengths = np.array([len(key) for key in keys])
        weights = np.maximum(1 / window_rows, lengths / _WINDOW_BYTES) * (num_rows / len(keys))
        return choose_ranges(keys, weights, int(np.ceil(weights.sum() - 1e-6)))

    def _deal_out(self, ranges: KeyRanges, spool: Spool) -> Ints:
        """Put each row into its window; returns the tokens that each repeats."""
        edges: list[_Edges | None] = [None] * ranges.count
        for rows in self._source.read(self._wanted, self._columns):
            keys = self._builder.keys(rows.table)
            windows = ranges.assign([key or b"" for key in keys], rows.index)
            spool.add(rows, windows)
            _widen(edges, keys, windows, rows.table)
        return _repeated_tokens(edges, self._builder)


def _sampled(wanted: NDArray[np.bool_], rate: float) -> NDArray[np.bool_]:
    """About this share of the wanted rows, at random; as little memory as the mask itself."""
    rng = np.random.default_rng(0)
    sampled = wanted.copy()
    for begin in range(0, len(sampled), _MASK_CHUNK):
        chunk = sampled[begin : begin + _MASK_CHUNK]
        chunk &= rng.random(len(chunk)) < rate
    return sampled


@dataclass(slots=True)
class _Edges:
    """The first and the last row of a window in the order of keys; tables of one row."""

    low: bytes
    high: bytes
    first: pa.Table
    last: pa.Table


def _widen(
    edges: list[_Edges | None], keys: list[bytes | None], windows: Ints, table: pa.Table
) -> None:
    for place, (key, window) in enumerate(zip(keys, windows.tolist(), strict=True)):
        known = edges[window]
        if key is None or (known is not None and known.low <= key <= known.high):
            continue
        row = table.take([place])  # a copy, so that the batch can go
        if known is None:
            edges[window] = _Edges(key, key, row, row)
        elif key < known.low:
            known.low, known.first = key, row
        else:
            known.high, known.last = key, row


def _repeated_tokens(edges: list[_Edges | None], builder: PromptBuilder) -> Ints:
    """The tokens that a window's first row has in common with the last one before it."""
    repeated: Ints = np.zeros(len(edges), dtype=np.int64)
    before: _Edges | None = None
    for window, edge in enumerate(edges):
        if before is not None and edge is not None:
            tokens = builder.build(pa.concat_tables([before.last, edge.first])).tokens
            repeated[window] = common_prefix_lengths(tokens, np.arange(2))[0]
        before = edge or before
    return repeated
