"""The Llama architecture over flat, ragged batches: no padding token is ever computed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from batchllm.errors import ModelError
from batchllm.models.config import ModelConfig
from batchllm.models.rope import RotaryEmbedding

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, query [n, heads, d], key and value [n, kv_heads, d]) -> [n, heads, d]."""


@dataclass(slots=True)
class LlamaLayer:
    """One decoder layer's weights, query-key-value and gate-up fused; biases None where absent."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class LlamaModel:
    """LlamaForCausalLM, inference only. Attention is handed in: the model knows no cache."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        self._rotary = RotaryEmbedding(config)
        self._embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        tied = config.tie_word_embeddings
        self._head = self._embedding if tied else torch.empty_like(self._embedding)
        self._norm = torch.empty(config.hidden_size, dtype=dtype)
        self._layers = [self._empty_layer() for _ in range(config.num_layers)]

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy weights in, one tensor at a time, by their Hugging Face names.

        Raises:
            ModelError: a tensor is missing, unknown or of the wrong shape.
        """
        places = dict(self._places())
        for name, tensor in weights:
            place = places.pop(name, None)
            if place is None:
                if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
                    continue  # a copy of tied weights, and a constant some checkpoints carry
                raise ModelError(f"unexpected tensor {name} for {self.config.architecture}")
            if place.shape != tensor.shape:
                raise ModelError(
                    f"tensor {name} has shape {list(tensor.shape)}, expected {list(place.shape)}"
                )
            place.copy_(tensor)
        if places:
            raise ModelError(f"{len(places)} tensors are missing, among them {next(iter(places))}")

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size] before the final norm.

        Args:
            token_ids: int [num_tokens].
            positions: int64 [num_tokens], each token's place in its prompt.
            attend: writes keys and values to the cache and attends; called once a layer.
        """
        config = self.config
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        cos, sin = self._rotary(positions)
        hidden = F.embedding(token_ids, self._embedding)
        for index, layer in enumerate(self._layers):
            normed = self._rms_norm(hidden, layer.input_norm)
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(len(hidden), -1, head_dim)
            rotated = self._rotary.rotate(qkv[:, : heads + kv_heads], cos, sin)
            attended = attend(
                index, rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :]
            )
            hidden = hidden + F.linear(attended.flatten(1), layer.output, layer.output_bias)
            normed = self._rms_norm(hidden, layer.post_norm)
            gate, up = F.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate) * up, layer.down, layer.down_bias)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits of hidden states [n, hidden_size]: [n, vocab_size], in the dtype."""
        return F.linear(self._rms_norm(hidden, self._norm), self._head)

    def _rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.config.rms_norm_eps)

    def _empty_layer(self) -> LlamaLayer:
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        queries = config.num_heads * config.head_dim
        qkv = queries + 2 * config.num_kv_heads * config.head_dim

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(*shape, dtype=self.dtype)

        def bias(size: int, wanted: bool) -> torch.Tensor | None:
            return empty(size) if wanted else None

        return LlamaLayer(
            input_norm=empty(hidden),
            qkv=empty(qkv, hidden),
            qkv_bias=bias(qkv, config.attention_bias),
            output=empty(hidden, queries),
            output_bias=bias(hidden, config.attention_bias),
            post_norm=empty(hidden),
            gate_up=empty(2 * inner, hidden),
            gate_up_bias=bias(2 * inner, config.mlp_bias),
            down=empty(hidden, inner),
            down_bias=bias(hidden, config.mlp_bias),
        )

    def _places(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Where each Hugging Face tensor goes: views of the (fused) weights."""
        config = self.config
        key_value = config.num_kv_heads * config.head_dim
        qkv_sizes = [config.num_heads * config.head_dim, key_value, key_value]
        yield "model.embed_tokens.weight", self._embedding
        yield "model.norm.weight", self._norm
        if not config.tie_word_embeddings:
            yield "lm_head.weight", self._head
        for index, layer in enumerate(self._layers):
            prefix = f"model.layers.{index}"
            yield f"{prefix}.input_layernorm.weight", layer.input_norm
            yield f"{prefix}.post_attention_layernorm.weight", layer.post_norm
            for kind, qkv, output, gate_up, down in (
                ("weight", layer.qkv, layer.output, layer.gate_up, layer.down),
                ("bias", layer.qkv_bias, layer.output_bias, layer.gate_up_bias, layer.down_bias),
            ):
                if qkv is not None and output is not None:
                    for name, part in zip("qkv", torch.split(qkv, qkv_sizes), strict=True):
                        yield f"{prefix}.self_attn.{name}_proj.{kind}", part
                    yield f"{prefix}.self_attn.o_proj.{kind}", output
                if gate_up is not None and down is not None:
                    gate, up = gate_up.chunk(2)
                    yield f"{prefix}.mlp.gate_proj.{kind}", gate
                    yield f"{prefix}.mlp.up_proj.{kind}", up
                    yield f"{prefix}.mlp.down_proj.{kind}", down
