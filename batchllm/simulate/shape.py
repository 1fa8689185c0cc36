"""A model's sizes, as far as they cost time and memory."""

from dataclasses import dataclass

from batchllm.errors import UsageError
from batchllm.models.config import ModelConfig


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


def shape_of(config: ModelConfig, dtype: str) -> ModelShape:
    """The sizes of a model run in `dtype` ("bfloat16" or "float32")."""
    size = {"bfloat16": 2, "float32": 4}[dtype]
    return ModelShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        bytes_per_value=size,
        kv_bytes_per_value=size,
    )


def _shape(
    layers: int, hidden: int, ffn: int, heads: tuple[int, int, int], vocab: int
) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=heads[2],
        vocab_size=vocab,
    )


# From the models' published config.json.
SHAPES: dict[str, ModelShape] = {
    "smollm2-135m": _shape(30, 576, 1536, (9, 3, 64), 49_152),
    "llama-3.2-1b": _shape(16, 2048, 8192, (32, 8, 64), 128_256),
    "qwen2.5-7b": _shape(28, 3584, 18_944, (28, 4, 128), 152_064),
    "llama-3.1-8b": _shape(32, 4096, 14_336, (32, 8, 128), 128_256),
}


def get_shape(name: str) -> ModelShape:
    """Look a model shape up.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in SHAPES:
        raise UsageError(f"no model shape named {name!r}; there are: {', '.join(SHAPES)}")
    return SHAPES[name]
