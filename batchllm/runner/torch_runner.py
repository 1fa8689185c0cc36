"""The runner: a batch through the model, on torch."""

import torch

from batchllm.attention.backend import AttentionBackend
from batchllm.models.registry import Model
from batchllm.runner.kv_cache import KVCache
from batchllm.runner.model_input import ModelInput, build_model_input
from batchllm.sampling.sampler import sample_tokens
from batchllm.scheduler.batch import Batch, StepOutput


class TorchRunner:
    """Lays a batch out flat, plans its attention once, runs the layers, samples."""

    def __init__(
        self, model: Model, cache: KVCache, backend: AttentionBackend, block_size: int
    ) -> None:
        self._model = model
        self._cache = cache
        self._backend = backend
        self._block_size = block_size

    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepOutput:
        """Run one step."""
        step = build_model_input(batch, self._block_size)
        return StepOutput(sample_tokens(self.logits(step), step.samples))

    @torch.inference_mode()
    def logits(self, step: ModelInput) -> torch.Tensor:
        """Logits [num_samples, vocab_size] of the tokens to sample, in the model's dtype."""
        plan = self._backend.plan(step.items, len(step.token_ids))
        slots = torch.from_numpy(step.slots)
        cache = self._cache

        def attend(
            layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> torch.Tensor:
            cache.write(layer, slots, key, value)
            return plan.run(query, key, value, cache.keys[layer], cache.values[layer])

        hidden = self._model.forward(
            torch.from_numpy(step.token_ids), torch.from_numpy(step.positions), attend
        )
        return self._model.logits(hidden[torch.from_numpy(step.sample_rows)])
