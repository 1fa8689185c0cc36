"""Which class runs which architecture."""

from collections.abc import Iterable
from typing import Protocol

import torch

from batchllm.errors import ModelError
from batchllm.models.config import ModelConfig
from batchllm.models.llama import Attend, Layers, LlamaModel
from batchllm.models.operations import Operations
from batchllm.models.parallel import WHOLE, Shard
from batchllm.models.rope import RotaryEmbedding


class Model(Protocol):
    """A decoder over flat batches; see `LlamaModel` for shapes."""

    config: ModelConfig
    dtype: torch.dtype
    rotary: RotaryEmbedding

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy weights in by their Hugging Face names."""
        ...

    def smooth(self, token_ids: torch.Tensor, attend: Attend) -> None:
        """Make activations easy to round, by what these tokens' are."""
        ...

    def pack(self, quantization: str | None) -> None:
        """Lay the weights out for products; after `load`, before anything is computed."""
        ...

    def forward(
        self, token_ids: torch.Tensor, attend: Attend, sample_rows: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [num_samples, hidden_size]."""
        ...

    def layers(self, token_ids: torch.Tensor, sample_rows: torch.Tensor) -> Layers:
        """The same, stopping for attention."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocab_size]."""
        ...

    def greedy(self, hidden: torch.Tensor) -> torch.Tensor:
        """The first largest of each row's, an integer [n]."""
        ...


_MODELS = {
    "LlamaForCausalLM": LlamaModel,
    "Qwen2ForCausalLM": LlamaModel,  # which differs in where there are biases, as the config says
}


def make_model(
    config: ModelConfig, dtype: torch.dtype, operations: Operations, shard: Shard = WHOLE
) -> Model:
    """Create the model, or a shard of it, weights still empty.

    Raises:
        ModelError: the architecture is not supported.
        UsageError: it cannot be cut into that many shards.
    """
    if config.architecture not in _MODELS:
        raise ModelError(
            f"architecture {config.architecture} is not supported; there are: {', '.join(_MODELS)}"
        )
    return _MODELS[config.architecture](config, dtype, operations, shard)
