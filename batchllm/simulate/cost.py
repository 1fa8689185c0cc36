"""How long a step takes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.divide import Rates
from batchllm.scheduler.batch import Batch
from batchllm.scheduler.split import first_half
from batchllm.simulate.machine import Machine
from batchllm.simulate.shape import ModelShape

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
LEAST_HIDDEN = 0.02  # of products and attention: for less, halves are not worth their launches


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a batch, by what takes them; of these, `hidden` go by at the same time as others.

    0 are hidden where the batch is not to be computed in halves side by side.
    """

    gemm: float
    head: float
    attention: float
    overhead: float
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        return self.gemm + self.head + self.attention + self.overhead - self.hidden


@dataclass(frozen=True, slots=True)
class StepWork:
    """What is in one step, in counts.

    `pairs` of query and key are those of prefill chunks and of shared segments, `decode_reads` the
    tokens of their own that decodes read, `reads` the tokens of all segments, each counted once,
    `num_segments` the chunks and segments of `pairs`.
    """

    num_tokens: int
    num_samples: int
    pairs: int
    decode_reads: int
    reads: int
    num_segments: int


def work_of(batch: Batch) -> StepWork:
    """Count the (first) step of a batch."""
    count, offset, shared = batch.chunks.count, batch.chunks.offset, batch.shared
    num_tokens = batch.num_tokens
    pairs, num_segments = 0, len(shared)
    own_reads = decode_reads = int(offset.sum()) + num_tokens
    if batch.num_decodes < len(count):
        decode = count == 1
        num_ones = int(np.count_nonzero(decode))
        decode_reads = int(offset.dot(decode)) + num_ones
        # A chunk's own tokens see half of each other, and all of what was there before.
        pairs = int(count.dot(offset)) + (int(count.dot(count)) + num_tokens) // 2 - decode_reads
        num_segments += len(count) - num_ones
    return StepWork(
        num_tokens=num_tokens,
        num_samples=len(batch.samples),
        pairs=pairs + int(_shared_queries(batch).dot(shared.length)),
        decode_reads=decode_reads,
        reads=own_reads + int(shared.length.sum()),
        num_segments=num_segments,
    )


def halved_work(batch: Batch) -> list[tuple[int, float, float]]:
    """Tokens, pairs of query and key, and tokens read, of either half (see `split_batch`).

    Of a mean step; in each next one every decode has a token more to read.
    """
    chunks, shared = batch.chunks, batch.shared
    taken = first_half(batch)
    halves: list[tuple[int, float, float]] = []
    for count, offset in ((taken, chunks.offset), (chunks.count - taken, chunks.offset + taken)):
        before = np.zeros(len(count) + 1, dtype=np.int64)
        count.cumsum(out=before[1:])
        queries = before[shared.chunk_end] - before[shared.chunk_begin]
        num_tokens = int(before[-1])
        grown = np.count_nonzero(count) * (batch.num_steps - 1) / 2
        pairs = int(count.dot(offset)) + (int(count.dot(count)) + num_tokens) // 2
        reads = int(offset.dot(count > 0)) + num_tokens
        pairs += int(queries.dot(shared.length))
        reads += int(shared.length.dot(queries > 0))
        halves.append((num_tokens, pairs + grown, reads + grown))
    return halves


def _shared_queries(batch: Batch) -> Ints:
    """Tokens that attend to each shared segment, [num_shared]."""
    count, shared = batch.chunks.count, batch.shared
    if batch.num_decodes == len(count):  # one token each
        return shared.chunk_end - shared.chunk_begin
    before = np.zeros(len(count) + 1, dtype=np.int64)
    count.cumsum(out=before[1:])
    queries: Ints = before[shared.chunk_end] - before[shared.chunk_begin]
    return queries


class CostModel:
    """A step's time, from what is in the batch.

    The products of the body and of the head, each bound by arithmetic or by reading the weights;
    then attention, bound by arithmetic over all queries or by reading each segment once: segment by
    segment, or all together where one launch takes them all. One after the other; or, where the
    machine says how they share it, and if that is faster, in two halves of the batch (NanoFlow's
    nano-batches): attention of one beside the products of the other.
    """

    def __init__(self, machine: Machine, shape: ModelShape) -> None:
        self.machine = machine
        self.shape = shape
        # Of a pair of query and key, of reading a token's KV, and of reading the body's weights:
        self.pair_seconds = shape.attention_flops / machine.attention_rate
        self.read_seconds = shape.kv_bytes_per_token / (machine.kv_bandwidth or machine.bandwidth)
        self._body, self._head = shape.body_parameters, shape.head_parameters
        self.weights_seconds = self._body * shape.bytes_per_value / machine.bandwidth
        self._products: dict[tuple[int, int], float] = {}  # there are no more than a budget's
        self._tables: dict[int, tuple[Floats, Floats]] = {}

    @property
    def overlaps(self) -> bool:
        """Whether attention and products may run side by side."""
        return self.machine.overlap_share > 0

    def cost(self, batch: Batch) -> StepCost:
        """The batch's cost, over all the steps it stands for."""
        machine, steps = self.machine, batch.num_steps
        work = work_of(batch)
        apart = machine.step_seconds + machine.token_seconds * work.num_tokens
        apart += machine.sample_seconds * work.num_samples
        gemm = self.product(self._body, work.num_tokens)
        attention = machine.segment_seconds * work.num_segments
        if machine.one_attention_launch:
            attention += max(self._attention_at_once(batch, work))
        else:
            attention += self._attention_apart(batch)
        hidden, least = 0.0, LEAST_HIDDEN * (gemm + attention)
        if work.num_tokens > 1 and self._most_hidden(gemm, attention) >= least:
            hidden = gemm + attention - self._overlapped(batch)
        if hidden < least:
            hidden = 0.0
        return StepCost(
            gemm=steps * gemm,
            head=steps * self.product(self._head, work.num_samples),
            attention=steps * attention,
            overhead=steps * apart,
            hidden=steps * hidden,
        )

    def rates(self, prefill_tokens: int, decodes: int) -> Rates:
        """What things add to a run with so many tokens in a prefill step, and so many decodes."""
        machine = self.machine
        prefill = self.product(self._body, prefill_tokens) + machine.step_seconds
        decode = self.product(self._body, decodes) + self.product(self._head, decodes)
        return Rates(
            prompt_token=prefill / prefill_tokens + machine.token_seconds,
            pair=self.pair_seconds,
            output_token=(decode + machine.step_seconds) / decodes
            + (machine.token_seconds + machine.sample_seconds),
            read=self.read_seconds,
        )

    def product(self, parameters: int, num_tokens: int) -> float:
        """Seconds of `num_tokens` rows times `parameters` weights."""
        if num_tokens == 0:
            return 0.0
        seconds = self._products.get((parameters, num_tokens))
        if seconds is None:
            machine = self.machine
            arithmetic = 2 * parameters * num_tokens / machine.gemm_rate(num_tokens)
            reading = parameters * self.shape.bytes_per_value / machine.bandwidth
            seconds = self._products[parameters, num_tokens] = max(arithmetic, reading)
        return seconds

    def product_tables(self, most: int) -> tuple[Floats, Floats]:
        """Seconds of the body's and of the head's products of 0 to `most` rows, [most + 1]."""
        if most not in self._tables:
            body, head = (
                np.array([self.product(parameters, rows) for rows in range(most + 1)])
                for parameters in (self._body, self._head)
            )
            self._tables[most] = body, head
        return self._tables[most]

    def _most_hidden(self, products: float, attention: float) -> float:
        """What can be hidden at most, however a batch is halved: told without halving it.

        Each half reads the weights, and attention of both takes no less than of the whole. Then it
        is as in `_beside`, where either case takes at least what the other would.
        """
        share, speed = self.machine.overlap_share, self.machine.overlap_speed
        if not share:
            return 0.0
        halves = max(products, 2 * self.weights_seconds)
        first = halves + attention * share / speed
        second = attention + halves * (1 - speed) / (1 - share)
        return products + attention - max(first, second)

    def _overlapped(self, batch: Batch) -> float:
        """Seconds of products and attention, those of either half beside the other's."""
        products, attention = [], []
        for num_tokens, pairs, reads in halved_work(batch):
            products.append(self.product(self._body, num_tokens))
            attention.append((self.pair_seconds * pairs, self.read_seconds * reads))
        apart = sum(products) + sum(map(max, attention))
        beside = sum(map(self._beside, products, reversed(attention)))
        # Nothing is beside the first products and the last attention: about a layer's.
        return beside + (apart - beside) / self.shape.num_layers

    def _beside(self, products: float, attention: tuple[float, float]) -> float:
        """Seconds of both, side by side; until either ends, each has its share of the machine."""
        share, (arithmetic, reading) = self.machine.overlap_share, attention
        shared = max(arithmetic / share, reading / self.machine.overlap_speed)
        if shared * (1 - share) <= products:
            return products + shared * share
        until = products / (1 - share)
        return until + (1 - until / shared) * max(attention)

    def _attention_at_once(self, batch: Batch, work: StepWork) -> tuple[float, float]:
        """Seconds of its arithmetic and of its reading; the slower hides the other.

        Of a mean step; in each next one every decode has a token more to read.
        """
        # With several steps, every chunk is a decode.
        grown = len(batch.chunks) * (batch.num_steps - 1) / 2
        pairs = work.pairs + work.decode_reads + grown
        return self.pair_seconds * pairs, self.read_seconds * (work.reads + grown)

    def _attention_apart(self, batch: Batch) -> float:
        """As `_attention_at_once`, segment by segment."""
        chunks, shared = batch.chunks, batch.shared
        decode = chunks.count == 1
        grown = decode * ((batch.num_steps - 1) / 2)
        own = chunks.count * chunks.offset + chunks.count * (chunks.count + 1) // 2
        # A decode of its own is bound by reading, whatever its arithmetic would take alone.
        own[decode] = 0
        arithmetic = self.pair_seconds * np.concatenate(
            [own, _shared_queries(batch) * shared.length]
        )
        reading = self.read_seconds * np.concatenate(
            [chunks.offset + chunks.count + grown, shared.length]
        )
        return float(np.maximum(arithmetic, reading).sum())
