"""The runner of a GPU: steps are given to the device and their tokens read later.

Nothing between two steps waits for the device: index arrays go over by one copy from pinned memory,
tokens come back by another, and the next step takes what was sampled from where it lies
(`TokenFeed`). So the host can be as far ahead as whoever calls `submit` lets it.
"""

from dataclasses import dataclass

import numpy as np
import torch

from batchllm.attention.backend import AttentionBackend, GraphBackend, LayerPlan
from batchllm.models.operations import Operations
from batchllm.models.registry import Model
from batchllm.models.rope import Rotation
from batchllm.runner.decode_graphs import DecodeGraphs
from batchllm.runner.device import Device, SideStream
from batchllm.runner.forward import PlannedStep, run_layers, run_nano_batches
from batchllm.runner.graphs import Recorder
from batchllm.runner.kv_cache import KVCache
from batchllm.runner.model_input import build_model_input
from batchllm.runner.nano_batches import NanoBatching, rows_in_order
from batchllm.runner.staging import Stager
from batchllm.runner.token_feed import TokenFeed
from batchllm.sampling.sampler import Draw, Draws, draw_all_sorted, put_draws, sample_on_device
from batchllm.scheduler.batch import Batch, Samples, StepOutput
from batchllm.scheduler.split import split_batch

_ROWS = 256  # sampled at a time, which bounds the memory of their logits


class PendingTokens:
    """What a step will have sampled, on its way to the host."""

    def __init__(self, tokens: torch.Tensor, device: Device) -> None:
        self._host = device.pinned(tokens.nbytes)
        self._host.view(torch.int32).copy_(tokens, non_blocking=True)
        self._arrived = device.event()
        self._arrived.record()

    def result(self) -> StepOutput:
        """Wait for the step."""
        self._arrived.synchronize()
        return StepOutput(self._host.numpy().view(np.int32).copy())


@dataclass(frozen=True, slots=True)
class _Given:
    """What was put of a step, or of half of it, still on its way; see `ModelInput`."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    sample_rows: torch.Tensor
    sources: torch.Tensor | None
    rotation: Rotation
    plan: LayerPlan


class DeviceRunner:
    """Runs steps on a device, those of decodes alone from recordings where a recorder is given.

    With `nano_batching`, those that it pays for go in nano-batches.

    The last block of the cache is the runner's own, see `DecodeGraphs`.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        backend: AttentionBackend,
        operations: Operations,
        device: Device,
        *,
        block_size: int,
        max_num_seqs: int,
        recorder: Recorder | None = None,
        draw: Draw = draw_all_sorted,
        nano_batching: NanoBatching | None = None,
    ) -> None:
        self._model = model
        self._draw = draw
        self._cache = cache
        self._backend = backend
        self.operations = operations
        self._device = device
        self._block_size = block_size
        self._stager = Stager(device)
        self._feed = TokenFeed(max_num_seqs, device.torch_device)
        self._nano_batching = nano_batching
        self._graphs = self._make_graphs(recorder, backend, max_num_seqs, None)
        self._nano_graphs: DecodeGraphs | None = None
        if nano_batching is not None:
            self._nano_graphs = self._make_graphs(
                recorder, nano_batching.backend, max_num_seqs, nano_batching.stream
            )

    @property
    def num_blocks(self) -> int:
        """Blocks of KV that sequences may have."""
        return self._cache.num_blocks - 1

    def execute(self, batch: Batch) -> StepOutput:
        """Run one step and wait for it."""
        return self.submit(batch).result()

    @torch.inference_mode()
    def submit(self, batch: Batch) -> PendingTokens:
        """Give the device one step to do, behind those it has."""
        draws = self._put_draws(batch.samples)
        nano_batching = self._nano_batching
        if nano_batching is not None and (batch.num_tokens < 2 or not nano_batching.pays(batch)):
            nano_batching = None
        if any(draws):
            tokens = self._draw_tokens(batch, draws, nano_batching)
        else:
            tokens = self._greedy_tokens(batch, nano_batching)
        tokens = tokens[: len(batch.samples)]
        self._feed.keep(tokens)
        return PendingTokens(tokens, self._device)

    def resize(self, num_blocks: int) -> int:
        """Go on with `num_blocks` of KV, or as many as there are; all that is held is lost."""
        self._device.synchronize()
        for graphs in (self._graphs, self._nano_graphs):
            if graphs is not None:
                graphs.forget()
        self._device.free_memory()  # what was kept for steps may be what is missing
        self._cache.shrink(num_blocks + 1)
        return self.num_blocks

    shrink = resize

    def run_whole(self) -> None:
        """Run no more steps in halves."""
        self._nano_batching = self._nano_graphs = None

    def _greedy_tokens(self, batch: Batch, nano_batching: NanoBatching | None) -> torch.Tensor:
        graphs = self._graphs if nano_batching is None else self._nano_graphs
        tokens = None if graphs is None else graphs.greedy_tokens(batch)
        return (
            self._sample_greedily(self._layers(batch, nano_batching)) if tokens is None else tokens
        )

    def _draw_tokens(
        self, batch: Batch, draws: list[list[Draws]], nano_batching: NanoBatching | None
    ) -> torch.Tensor:
        graphs = self._graphs if nano_batching is None else self._nano_graphs
        hidden = None if graphs is None else graphs.hidden(batch)
        if hidden is None:
            return self._sample(self._layers(batch, nano_batching), draws)
        self._stager.send()
        return self._sample(hidden, draws)

    def _layers(self, batch: Batch, nano_batching: NanoBatching | None) -> torch.Tensor:
        """Send all that was put, and run the layers: [num_samples (at least 1), hidden_size]."""
        if nano_batching is not None:
            return self._layers_of_nano_batches(batch, nano_batching)
        given = self._put(batch, self._backend)
        self._stager.send()
        return run_layers(self._model, self._cache, self._ready(given))

    def _layers_of_nano_batches(self, batch: Batch, nano_batching: NanoBatching) -> torch.Tensor:
        halves = split_batch(batch)
        given = [self._put(half.batch, nano_batching.backend) for half in halves]
        rows = self._stager.put(rows_in_order(halves))
        self._stager.send()
        steps = [self._ready(half) for half in given]
        return run_nano_batches(self._model, self._cache, steps, nano_batching.stream)[rows]

    def _put(self, batch: Batch, backend: AttentionBackend) -> _Given:
        step, put = build_model_input(batch, self._block_size), self._stager.put
        rotation = self._model.rotary.empty(len(step.token_ids))
        return _Given(
            token_ids=put(step.token_ids),
            positions=put(step.positions),
            # Kernels dislike to be given nothing at all.
            sample_rows=put(step.sample_rows if len(step.sample_rows) else np.zeros(1, np.int64)),
            sources=put(self._feed.sources(batch)) if len(batch.carried) else None,
            rotation=rotation,
            plan=backend.plan(step, rotation, put),
        )

    def _ready(self, given: _Given) -> PlannedStep:
        """What was put is on its way."""
        self._model.rotary.fill(given.rotation, given.positions)
        token_ids = given.token_ids
        if given.sources is not None:
            token_ids = self._feed.add(token_ids, given.sources)
        return PlannedStep(given.plan, token_ids, given.sample_rows)

    def _make_graphs(
        self,
        recorder: Recorder | None,
        backend: AttentionBackend,
        max_num_rows: int,
        stream: SideStream | None,
    ) -> DecodeGraphs | None:
        if recorder is None or not isinstance(backend, GraphBackend):
            return None
        return DecodeGraphs(
            self._model,
            self._cache,
            backend,
            self._feed,
            self._device,
            recorder,
            self._sample_greedily,
            block_size=self._block_size,
            max_num_rows=max_num_rows,
            stream=stream,
        )

    def _put_draws(self, samples: Samples) -> list[list[Draws]]:
        """For each part of the samples that is sampled at a time."""
        vocab_size = self._model.config.vocab_size
        return [
            put_draws(samples.part(begin, begin + _ROWS), vocab_size, self._stager.put)
            for begin in range(0, max(len(samples), 1), _ROWS)
        ]

    def _sample(self, hidden: torch.Tensor, draws: list[list[Draws]]) -> torch.Tensor:
        parts = zip(torch.split(hidden, _ROWS), draws, strict=True)
        tokens = [
            sample_on_device(self._model.logits(part), drawn, self.operations.argmax, self._draw)
            for part, drawn in parts
        ]
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens)

    def _sample_greedily(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._sample(hidden, [[] for _ in range(0, len(hidden), _ROWS)])
