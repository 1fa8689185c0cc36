"""Decode-only steps, recorded once for each number of rows and replayed.

A step of decodes has few tokens, so launching its hundreds of operations one by one takes the host
longer than the device needs for them. A recorded step is one launch. What it reads lies in places
that never move, and its number of rows is fixed: a batch is filled up to the next of a few sizes
with rows that decode nothing, whose KV goes to a block that nobody reads.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from batchllm.attention.backend import GraphBackend, GraphPlan, Reserve
from batchllm.models.registry import Model
from batchllm.models.rope import Rotation
from batchllm.runner.device import Device, SideStream
from batchllm.runner.forward import PlannedStep, run_layers, run_nano_batches
from batchllm.runner.graphs import Recorder, Replay
from batchllm.runner.kv_cache import KVCache
from batchllm.runner.model_input import ModelInput, build_model_input
from batchllm.runner.staging import FixedStager
from batchllm.runner.token_feed import TokenFeed
from batchllm.scheduler.batch import Batch, Chunks
from batchllm.scheduler.split import split_rows

Ints = NDArray[np.int64]

_SIZES_A_DOUBLING = 8  # one row in sixteen is filling, then
_LEAST_FILLING = 8
_MOST_FILLING = 128  # products are computed in tiles of so many rows anyway
# Recording a step takes as long as launching some twenty, which a size that is rare is not worth.
_RUNS_BEFORE = 16

Sample = Callable[[torch.Tensor], torch.Tensor]
Finish = Callable[[torch.Tensor], None]
"""What becomes of a step's hidden states, [num_rows, hidden_size]."""


class DecodeGraphs:
    """Runs decode-only batches of up to `max_num_rows` rows from recordings.

    Those that it cannot run, or not yet, it leaves to the caller. With a `stream` for attention
    they run in nano-batches, see `run_nano_batches`.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        backend: GraphBackend,
        feed: TokenFeed,
        device: Device,
        recorder: Recorder,
        sample: Sample,
        *,
        block_size: int,
        max_num_rows: int,
        stream: SideStream | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._feed = feed
        self._recorder = recorder
        self._sample = sample
        self._block_size = block_size
        self._sizes = row_sizes(max_num_rows)
        self._inputs = FixedStager(device)
        self._token_ids = self._inputs.reserve(max_num_rows, np.int32)
        self._sources = self._inputs.reserve(max_num_rows, np.int64)
        self._positions = self._inputs.reserve(max_num_rows, np.int64)
        self._stream = stream
        self._rows = torch.arange(max_num_rows, device=device.torch_device)
        shape = (max_num_rows, model.config.hidden_size)
        self._hidden = torch.empty(shape, dtype=model.dtype, device=device.torch_device)
        self._tokens = torch.empty(max_num_rows, dtype=torch.int32, device=device.torch_device)
        self._parts = [
            _Part.of(model, backend, num_rows, self._inputs.reserve)
            for num_rows in self._part_sizes(max_num_rows)
        ]
        self._replays: dict[tuple[int, Finish], Replay] = {}
        self._runs: Counter[tuple[int, Finish]] = Counter()

    def greedy_tokens(self, batch: Batch) -> torch.Tensor | None:
        """The likeliest token of each sample, int32 [num_samples]; None where it cannot."""
        if not self._run(batch, self._sample_greedily):
            return None
        return self._tokens[: len(batch.samples)]

    def hidden(self, batch: Batch) -> torch.Tensor | None:
        """Hidden states [num_samples, hidden_size], before the final norm; None where it cannot."""
        if not self._run(batch, self._keep_hidden):
            return None
        return self._hidden[: len(batch.samples)]

    def forget(self) -> None:
        """Give all recordings up, because the KV cache has moved."""
        self._replays.clear()
        self._runs.clear()
        self._recorder.forget()

    def _sample_greedily(self, hidden: torch.Tensor) -> None:
        self._tokens[: len(hidden)] = self._sample(hidden)

    def _keep_hidden(self, hidden: torch.Tensor) -> None:
        self._hidden[: len(hidden)] = hidden

    def _run(self, batch: Batch, finish: Finish) -> bool:
        """Run the layers and `finish`, if this batch is one to replay."""
        num_rows = len(batch.chunks)
        if not len(self._parts) <= num_rows <= self._sizes[-1] or not batch.is_decode_only:
            return False
        size = int(self._sizes[self._sizes.searchsorted(num_rows)])
        key = (size, finish)
        if key not in self._replays and self._runs[key] < _RUNS_BEFORE:
            self._runs[key] += 1
            return False
        padded = pad_decodes(batch, size, scratch_block=self._cache.num_blocks - 1)
        step = build_model_input(padded, self._block_size)
        if not self._update_plans(padded, step):
            return False
        self._token_ids.fill(step.token_ids)
        self._sources.fill(self._feed.sources(padded))
        self._positions.fill(step.positions)
        self._inputs.send()
        if key in self._replays:
            self._replays[key]()
            return True

        def step_of_this_size() -> None:
            self._step(size, finish)

        step_of_this_size()  # this batch's, and the run that recording wants before
        self._replays[key] = self._recorder.record(step_of_this_size)
        return True

    def _part_sizes(self, num_rows: int) -> list[int]:
        if self._stream is None:
            return [num_rows]
        return [num_rows // 2, num_rows - num_rows // 2]

    def _update_plans(self, batch: Batch, step: ModelInput) -> bool:
        """Tell the plans about a batch; False where it does not fit them."""
        steps = [step]
        if self._stream is not None:
            halves = split_rows(batch, len(batch.chunks) // 2)
            steps = [build_model_input(half.batch, self._block_size) for half in halves]
        return all(part.plan.update(s) for part, s in zip(self._parts, steps, strict=True))

    def _step(self, size: int, finish: Finish) -> None:
        """What is recorded: reads and writes nothing that moves."""
        sizes = self._part_sizes(size)
        token_ids = self._feed.add(self._token_ids.tensor[:size], self._sources.tensor[:size])
        positions = torch.split(self._positions.tensor[:size], sizes)
        steps = []
        for part, ids, at in zip(
            self._parts, torch.split(token_ids, sizes), positions, strict=True
        ):
            self._model.rotary.fill(part.rotation.first(len(ids)), at)
            steps.append(PlannedStep(part.plan, ids, self._rows[: len(ids)]))
        if self._stream is None:
            finish(run_layers(self._model, self._cache, steps[0]))
        else:
            finish(run_nano_batches(self._model, self._cache, steps, self._stream))


@dataclass(frozen=True, slots=True)
class _Part:
    """What plans the attention of some of the rows."""

    plan: GraphPlan
    rotation: Rotation

    @classmethod
    def of(cls, model: Model, backend: GraphBackend, num_rows: int, reserve: Reserve) -> "_Part":
        """For up to `num_rows` of them."""
        rotation = model.rotary.empty(num_rows)
        return cls(backend.graph_plan(num_rows, rotation, reserve), rotation)


def pad_decodes(batch: Batch, num_rows: int, *, scratch_block: int) -> Batch:
    """The same batch with more chunks of one token, in `scratch_block`, that sample nothing.

    They are all the same: token 0 at position 0, which sees itself.
    """
    chunks = batch.chunks
    num_chunks = len(chunks)
    more = np.zeros(num_rows - num_chunks, dtype=np.int64)
    tables = batch.tables
    scratch = np.full((len(more), max(tables.shape[1], 1)), scratch_block, dtype=tables.dtype)
    return Batch(
        token_ids=np.concatenate([batch.token_ids, more.astype(np.int32)]),
        chunks=Chunks(
            count=np.concatenate([chunks.count, more + 1]),
            start=np.concatenate([chunks.start, more]),
            offset=np.concatenate([chunks.offset, more]),
        ),
        shared=batch.shared,
        tables=np.concatenate([tables[:num_chunks], scratch, tables[num_chunks:]]),
        samples=batch.samples,
        num_decodes=batch.num_decodes,
        carried=batch.carried,
    )


def row_sizes(most: int) -> Ints:
    """The numbers of rows that steps are filled up to, ascending, the last of them `most`."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < most:
        power = 1 << sizes[-1].bit_length() - 1
        spacing = max(power // _SIZES_A_DOUBLING, _LEAST_FILLING)
        sizes.append(sizes[-1] + min(spacing, _MOST_FILLING))
    return np.array([*(size for size in sizes if size < most), most], dtype=np.int64)
