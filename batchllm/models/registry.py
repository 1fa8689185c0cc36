"""Which class runs which architecture."""

from collections.abc import Iterable
from typing import Protocol

import torch

from batchllm.errors import ModelError
from batchllm.models.config import ModelConfig
from batchllm.models.llama import Attend, LlamaModel
from batchllm.models.operations import Operations
from batchllm.models.rope import RotaryEmbedding


class Model(Protocol):
    """A decoder over flat batches; see `LlamaModel` for shapes."""

    config: ModelConfig
    dtype: torch.dtype
    rotary: RotaryEmbedding

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy weights in by their Hugging Face names."""
        ...

    def forward(
        self, token_ids: torch.Tensor, attend: Attend, sample_rows: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [num_samples, hidden_size]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocab_size]."""
        ...


_MODELS = {"LlamaForCausalLM": LlamaModel}


def make_model(
    config: ModelConfig,
    dtype: torch.dtype,
    operations: Operations,
    quantization: str | None = None,
) -> Model:
    """Create the model, weights still empty; `int8` quantization rounds them as they are packed.

    Raises:
        ModelError: the architecture is not supported.
    """
    if config.architecture not in _MODELS:
        raise ModelError(
            f"architecture {config.architecture} is not supported; there are: {', '.join(_MODELS)}"
        )
    return _MODELS[config.architecture](config, dtype, operations, quantization)
