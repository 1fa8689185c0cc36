"""The runner of a GPU: steps are given to the device and their tokens read later.

Nothing between two steps waits for the device: index arrays go over by one copy from pinned memory,
tokens come back by another, and the next step takes what was sampled from where it lies
(`TokenFeed`). So the host can be as far ahead as whoever calls `submit` lets it.
"""

import numpy as np
import torch

from batchllm.attention.backend import AttentionBackend, GraphBackend
from batchllm.models.operations import Operations
from batchllm.models.registry import Model
from batchllm.runner.decode_graphs import DecodeGraphs
from batchllm.runner.device import Device
from batchllm.runner.forward import run_layers
from batchllm.runner.graphs import Recorder
from batchllm.runner.kv_cache import KVCache
from batchllm.runner.model_input import build_model_input
from batchllm.runner.staging import Stager
from batchllm.runner.token_feed import TokenFeed
from batchllm.sampling.sampler import Draw, Draws, draw_all_sorted, put_draws, sample_on_device
from batchllm.scheduler.batch import Batch, Samples, StepOutput

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


class DeviceRunner:
    """Runs steps on a device, those of decodes alone from recordings where a recorder is given.

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
        self._graphs: DecodeGraphs | None = None
        if recorder is not None and isinstance(backend, GraphBackend):
            self._graphs = DecodeGraphs(
                model,
                cache,
                backend,
                self._feed,
                device,
                recorder,
                self._sample_greedily,
                block_size=block_size,
                max_num_rows=max_num_seqs,
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
        tokens = self._draw_tokens(batch, draws) if any(draws) else self._greedy_tokens(batch)
        tokens = tokens[: len(batch.samples)]
        self._feed.keep(tokens)
        return PendingTokens(tokens, self._device)

    def resize(self, num_blocks: int) -> int:
        """Go on with `num_blocks` of KV, or as many as there are; all that is held is lost."""
        self._device.synchronize()
        if self._graphs is not None:
            self._graphs.forget()
        self._device.free_memory()  # what was kept for steps may be what is missing
        self._cache.shrink(num_blocks + 1)
        return self.num_blocks

    shrink = resize

    def _greedy_tokens(self, batch: Batch) -> torch.Tensor:
        tokens = None if self._graphs is None else self._graphs.greedy_tokens(batch)
        return self._sample_greedily(self._layers(batch)) if tokens is None else tokens

    def _draw_tokens(self, batch: Batch, draws: list[list[Draws]]) -> torch.Tensor:
        hidden = None if self._graphs is None else self._graphs.hidden(batch)
        if hidden is None:
            return self._sample(self._layers(batch), draws)
        self._stager.send()
        return self._sample(hidden, draws)

    def _layers(self, batch: Batch) -> torch.Tensor:
        """Send all that was put, and run the layers: [num_samples (at least 1), hidden_size]."""
        step, put = build_model_input(batch, self._block_size), self._stager.put
        token_ids, positions = put(step.token_ids), put(step.positions)
        # Kernels dislike to be given nothing at all.
        rows = put(step.sample_rows if len(step.sample_rows) else np.zeros(1, np.int64))
        sources = put(self._feed.sources(batch)) if len(batch.carried) else None
        rotation = self._model.rotary.empty(len(step.token_ids))
        plan = self._backend.plan(step, rotation, put)
        self._stager.send()
        self._model.rotary.fill(rotation, positions)
        if sources is not None:
            token_ids = self._feed.add(token_ids, sources)
        return run_layers(self._model, self._cache, plan, token_ids, rows)

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
