"""A model's sizes, as far as they cost time and memory."""

from dataclasses import dataclass

from batchllm.models.config import ModelConfig
from batchllm.models.shapes import get_config


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder-only transformer with gated feed-forward layers.

    `bytes_per_value` is of the weights, `kv_bytes_per_value` of keys and values (2 for bfloat16).
    Norms, biases and the embedding's rows are left out: a thousandth.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    bytes_per_value: float = 2
    kv_bytes_per_value: float = 2

    @property
    def body_parameters(self) -> int:
        """Weights that every token is multiplied with."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return self.num_layers * self.hidden_size * (heads + 3 * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        """Weights that every sampled token is multiplied with."""
        return self.vocab_size * self.hidden_size

    @property
    def weight_bytes(self) -> float:
        """Bytes that a step reads of the weights."""
        return (self.body_parameters + self.head_parameters) * self.bytes_per_value

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bytes_per_value

    @property
    def attention_flops(self) -> int:
        """Floating-point operations of one query token over one key token, in all layers."""
        return 4 * self.num_layers * self.num_heads * self.head_dim


def shape_of(
    config: ModelConfig, dtype: str, kv_bytes_per_token: float | None = None
) -> ModelShape:
    """The sizes of a model run in `dtype` ("bfloat16" or "float32"), its KV too if not told."""
    size = {"bfloat16": 2, "float32": 4}[dtype]
    values = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return ModelShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        bytes_per_value=size,
        kv_bytes_per_value=size if kv_bytes_per_token is None else kv_bytes_per_token / values,
    )


def get_shape(name: str) -> ModelShape:
    """The sizes of a model that is known by its shape, run in bfloat16.

    Raises:
        UsageError: there is none of that name.
    """
    return shape_of(get_config(name), "bfloat16")
