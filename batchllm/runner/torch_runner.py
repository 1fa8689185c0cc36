"""The runner: a batch through the model, on torch."""

from collections.abc import Iterator

import numpy as np
import torch

from batchllm.attention.backend import AttentionBackend
from batchllm.models.operations import Operations
from batchllm.models.registry import Model
from batchllm.runner.forward import PlannedStep, run_layers
from batchllm.runner.kv_cache import KVCache
from batchllm.runner.model_input import ModelInput, build_model_input
from batchllm.sampling.sampler import sample_tokens
from batchllm.scheduler.batch import Batch, StepOutput

_ROWS = 256  # sampled at a time: their logits stay in the cache, and memory bounded


class TorchRunner:
    """Lays a batch out flat, plans its attention once, runs the layers, samples."""

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        backend: AttentionBackend,
        operations: Operations,
        block_size: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._backend = backend
        self.operations = operations
        self._block_size = block_size

    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepOutput:
        """Run one step."""
        step = build_model_input(batch, self._block_size)
        tokens = np.empty(len(step.samples), dtype=np.int32)
        begin = 0
        for logits in self._logits(step):
            end = begin + len(logits)
            tokens[begin:end] = sample_tokens(
                logits, step.samples.part(begin, end), self.operations.argmax
            )
            begin = end
        return StepOutput(tokens)

    def shrink(self, num_blocks: int) -> int:
        """Go on with `num_blocks` of KV, or as many as there are; all that is held is lost."""
        self._cache.shrink(num_blocks)
        return self._cache.num_blocks

    @torch.inference_mode()
    def logits(self, step: ModelInput) -> torch.Tensor:
        """Logits [num_samples, vocab_size] of the tokens to sample, in the model's dtype."""
        return torch.cat(list(self._logits(step)))

    def _logits(self, step: ModelInput) -> Iterator[torch.Tensor]:
        model, put = self._model, torch.from_numpy
        plan = self._backend.plan(step, model.rotary(put(step.positions)))
        planned = PlannedStep(plan, put(step.token_ids), put(step.sample_rows))
        hidden = run_layers(model, self._cache, planned)
        for part in torch.split(hidden, _ROWS):
            yield model.logits(part)
