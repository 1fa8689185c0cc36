"""The runner: a batch through the model, on torch."""

import numpy as np
import torch

from batchllm.attention.backend import AttentionBackend
from batchllm.models.operations import Operations
from batchllm.models.registry import Model
from batchllm.runner.forward import PlannedStep, run_layers
from batchllm.runner.kv_cache import KVCache
from batchllm.runner.model_input import ModelInput, build_model_input
from batchllm.sampling.sampler import draw_sorted, put_draws, sample_on_device
from batchllm.scheduler.batch import Batch, Samples, StepOutput

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
        for hidden in torch.split(self._hidden(step), _ROWS):
            end = begin + len(hidden)
            tokens[begin:end] = self._sample(hidden, step.samples.part(begin, end)).numpy()
            begin = end
        return StepOutput(tokens)

    def shrink(self, num_blocks: int) -> int:
        """Go on with `num_blocks` of KV, or as many as there are; all that is held is lost."""
        self._cache.shrink(num_blocks)
        return self._cache.num_blocks

    @torch.inference_mode()
    def logits(self, step: ModelInput) -> torch.Tensor:
        """Logits [num_samples, vocab_size] of the tokens to sample, in the model's dtype."""
        return torch.cat(
            [self._model.logits(part) for part in torch.split(self._hidden(step), _ROWS)]
        )

    def _hidden(self, step: ModelInput) -> torch.Tensor:
        model, put = self._model, torch.from_numpy
        plan = self._backend.plan(step, model.rotary(put(step.positions)))
        planned = PlannedStep(plan, put(step.token_ids), put(step.sample_rows))
        return run_layers(model, self._cache, planned)

    def _sample(self, hidden: torch.Tensor, samples: Samples) -> torch.Tensor:
        """One token for each of these hidden states; see `sample_on_device`."""
        draws = put_draws(samples, self._model.config.vocab_size, torch.from_numpy)
        if not draws:
            return self._model.greedy(hidden)
        logits = self._model.logits(hidden)
        return sample_on_device(logits, draws, self.operations.argmax, draw_sorted)
