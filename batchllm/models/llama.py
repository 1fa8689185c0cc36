"""The Llama architecture over flat, ragged batches: no padding token is ever computed."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from batchllm.errors import ModelError
from batchllm.models.config import ModelConfig
from batchllm.models.linear import GatedLinear, Linear
from batchllm.models.operations import Blocks, CompiledAttend, LayerParts, Operations
from batchllm.models.parallel import WHOLE, Shard
from batchllm.models.rope import RotaryEmbedding
from batchllm.models.smoothing import channel_factors, divide_rows, multiply_columns

Attend = Callable[[int, torch.Tensor], torch.Tensor]
"""(layer, queries, keys and values [n, heads + 2 kv_heads, d], not rotated) -> [n, heads * d].

Of the last layer's only the rows to sample are read."""
Layers = Generator[tuple[int, torch.Tensor], torch.Tensor, torch.Tensor]
"""A pass through the layers that stops for attention: yields what `Attend` takes, is sent what it
gives, and returns the hidden states."""


@dataclass(slots=True)
class LlamaLayer:
    """One decoder layer's weights, query-key-value and gate-up fused."""

    input_norm: torch.Tensor
    qkv: Linear
    output: Linear
    post_norm: torch.Tensor
    gate_up: GatedLinear
    down: Linear

    def parts(self) -> LayerParts:
        """For `Operations.pack_blocks`, once all is packed."""
        return LayerParts(
            self.input_norm,
            self.qkv.product,
            self.output.product,
            self.post_norm,
            self.gate_up.product,
            self.down.product,
        )


class LlamaModel:
    """LlamaForCausalLM, inference only. Attention is handed in: the model knows no cache.

    `config` is of the whole model, of which this is one shard; what it has is in `self.config`.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        operations: Operations,
        shard: Shard = WHOLE,
    ) -> None:
        self.config = config = shard.config(config)
        self._shard = shard
        self.dtype = dtype
        self.rotary = RotaryEmbedding(config)
        self._operations = operations
        self._embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        self._norm = torch.empty(config.hidden_size, dtype=dtype)
        self._layers = [self._empty_layer() for _ in range(config.num_layers)]
        self._blocks: Blocks | None = None
        begin, end = shard.bounds(config.vocab_size)
        self._head = Linear(config.hidden_size, end - begin, dtype=dtype)
        if config.tie_word_embeddings:
            self._head.weight = self._embedding[begin:end]

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

    def smooth(self, token_ids: torch.Tensor, attend: Attend) -> None:
        """Make activations easy to round, by what some tokens' are; see models/smoothing.py.

        `token_ids` int [num_tokens]; `attend` as in `forward`, over these tokens alone.
        """
        for linear in self._linears():
            linear.observe()
        hidden = self.forward(token_ids, attend, torch.arange(len(token_ids)))
        self._head.see(self._normed(hidden))  # nobody asks what it puts out
        if self.config.tie_word_embeddings:
            assert self._head.weight is not None
            self._head.weight = self._head.weight.clone()
        _divide_norm(self._norm, self._head)
        for layer in self._layers:
            _divide_norm(layer.input_norm, layer.qkv)
            _divide_norm(layer.post_norm, layer.gate_up)
            _divide_rows(layer.gate_up, layer.down, self.config.intermediate_size)
            # A value's channel is read by every head of its group.
            _divide_rows(layer.qkv, layer.output, self.config.head_dim, self.config.num_kv_heads)

    def pack(self, quantization: str | None) -> None:
        """Lay the weights out for products, rounded if `quantization` says so, and give them up."""
        operations = self._operations
        packs = {None: operations.pack, "int8": operations.pack_int8, "fp8": operations.pack_float8}
        for linear in self._linears():
            if isinstance(linear, GatedLinear):
                assert linear.weight is not None
                product = operations.pack_gated(linear.weight, linear.bias, quantization)
                if product is not None:
                    linear.pack_gated(product)
                    continue
            linear.pack(packs[quantization])
        if self._shard.size == 1:
            parts = [layer.parts() for layer in self._layers]
            self._blocks = operations.pack_blocks(parts, self.config.rms_norm_eps)

    def forward(
        self, token_ids: torch.Tensor, attend: Attend, sample_rows: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states of the tokens to sample, [num_samples, hidden_size], before the final norm.

        Args:
            token_ids: int [num_tokens].
            attend: writes keys and values to the cache and attends; called once a layer, where
                kernels cannot do so themselves (`CompiledAttend`).
            sample_rows: int64 [num_samples], ascending. What the last layer computes after its
                attention concerns nobody else, so it is computed for these alone.
        """
        compiled = attend if isinstance(attend, CompiledAttend) else None
        layers = self.layers(token_ids, sample_rows, compiled)
        try:
            asked = next(layers)
            while True:
                asked = layers.send(attend(*asked))
        except StopIteration as end:
            hidden: torch.Tensor = end.value
        return hidden

    def layers(
        self,
        token_ids: torch.Tensor,
        sample_rows: torch.Tensor,
        attend: CompiledAttend | None = None,
    ) -> Layers:
        """The same, for who attends to several passes in turn.

        With `attend` kernels may do all layers before it stops but the last, or, where all tokens
        are to sample, that one, too.
        """
        operations, shard, eps = self._operations, self._shard, self.config.rms_norm_eps

        def next_qkv(index: int, delta: torch.Tensor | None) -> torch.Tensor:
            layer = self._layers[index]
            return layer.qkv(operations.add_rms_norm(hidden, delta, layer.input_norm, eps))

        hidden = F.embedding(token_ids, self._embedding)
        blocks = None if self._blocks is None else self._blocks.start(hidden)
        shape, begin, last = (hidden.shape[0], -1, self.config.head_dim), 0, len(self._layers) - 1
        qkv = next_qkv(0, None)
        if blocks is not None and attend is not None:
            if len(sample_rows) == len(hidden) and blocks.run_through(qkv.view(shape), attend):
                return hidden
            result = blocks.run_all(qkv.view(shape), attend)
            if result is not None:
                begin, qkv = last, result
        for index in range(begin, last + 1):
            attended = yield index, qkv.view(shape)
            if blocks is not None and index < last:
                qkv = blocks.run(index, attended)
                continue
            if index == last:
                hidden, attended = hidden[sample_rows], attended[sample_rows]
            layer = self._layers[index]
            delta = shard.sum(layer.output(attended))
            normed = operations.add_rms_norm(hidden, delta, layer.post_norm, eps)
            delta = shard.sum(layer.down(layer.gate_up(normed)))
            if index < last:
                qkv = next_qkv(index + 1, delta)
        return hidden.add_(delta)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits of hidden states [n, hidden_size]: [n, vocab_size], in the dtype."""
        return self._logits(self._normed(hidden))

    def greedy(self, hidden: torch.Tensor) -> torch.Tensor:
        """The first largest of each row's logits, an integer [n]; -1 as in `Operations.argmax`."""
        normed = self._normed(hidden)
        tokens = self._head.argmax(normed) if self._shard.size == 1 else None
        return self._operations.argmax(self._logits(normed)) if tokens is None else tokens

    def _logits(self, normed: torch.Tensor) -> torch.Tensor:
        return self._shard.gather(self._head(normed), self.config.vocab_size)

    def _normed(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._operations.add_rms_norm(hidden, None, self._norm, self.config.rms_norm_eps)

    def _linears(self) -> Iterator[Linear]:
        yield self._head
        for layer in self._layers:
            for part in fields(layer):
                if isinstance(linear := getattr(layer, part.name), Linear):
                    yield linear

    def _empty_layer(self) -> LlamaLayer:
        config, dtype, adds_bias = self.config, self.dtype, self._shard.rank == 0
        hidden, inner = config.hidden_size, config.intermediate_size
        queries = config.num_heads * config.head_dim
        qkv = queries + 2 * config.num_kv_heads * config.head_dim
        return LlamaLayer(
            input_norm=torch.empty(hidden, dtype=dtype),
            qkv=Linear(hidden, qkv, dtype=dtype, bias=config.attention_bias),
            output=Linear(
                queries, hidden, dtype=dtype, bias=config.attention_output_bias and adds_bias
            ),
            post_norm=torch.empty(hidden, dtype=dtype),
            gate_up=GatedLinear(
                hidden,
                inner,
                dtype=dtype,
                activate=self._operations.silu_and_multiply,
                bias=config.mlp_bias,
            ),
            down=Linear(inner, hidden, dtype=dtype, bias=config.mlp_bias and adds_bias),
        )

    def _places(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Where each Hugging Face tensor goes: views of the (fused) weights."""
        config = self.config
        key_value = config.num_kv_heads * config.head_dim
        qkv_sizes = [config.num_heads * config.head_dim, key_value, key_value]
        yield "model.embed_tokens.weight", self._embedding
        yield "model.norm.weight", self._norm
        if not config.tie_word_embeddings:
            yield from _parts(self._head, "lm_head")
        for index, layer in enumerate(self._layers):
            prefix = f"model.layers.{index}"
            yield f"{prefix}.input_layernorm.weight", layer.input_norm
            yield f"{prefix}.post_attention_layernorm.weight", layer.post_norm
            attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
            yield from _parts(layer.qkv, *[f"{attention}.{n}_proj" for n in "qkv"], sizes=qkv_sizes)
            yield from _parts(layer.output, f"{attention}.o_proj")
            yield from _parts(layer.gate_up, f"{mlp}.gate_proj", f"{mlp}.up_proj")
            yield from _parts(layer.down, f"{mlp}.down_proj")


def _divide_norm(norm: torch.Tensor, linear: Linear) -> None:
    """Smooth the inputs of `linear`, which are what the norm puts out."""
    assert linear.weight is not None and linear.input_peaks is not None
    factors = channel_factors(linear.input_peaks, linear.weight_peaks())
    norm.div_(factors)
    multiply_columns(linear.weight, factors)


def _divide_rows(source: Linear, linear: Linear, size: int, blocks: int = 1) -> None:
    """Smooth the inputs of `linear`, which come of the last `blocks * size` outputs of `source`.

    Where there are more inputs than these, equally many neighbouring `size` come of each block.
    """
    assert source.weight is not None and linear.weight is not None
    assert linear.input_peaks is not None
    readers = linear.weight.shape[1] // (blocks * size)
    peaks, weight_peaks = (
        p.view(blocks, readers, size).amax(dim=1)
        for p in (linear.input_peaks, linear.weight_peaks())
    )
    factors = channel_factors(peaks, weight_peaks)
    multiply_columns(linear.weight, factors[:, None].expand(blocks, readers, size).reshape(-1))
    divide_rows(source.weight[-blocks * size :], factors.view(-1))
    if source.bias is not None:
        source.bias[-blocks * size :].div_(factors.view(-1))


def _parts(
    linear: Linear, *names: str, sizes: Sequence[int] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of a fused weight and bias, by the names of their parts; without sizes, equal parts."""
    for kind, whole in (("weight", linear.weight), ("bias", linear.bias)):
        if whole is not None:
            parts = whole.chunk(len(names)) if sizes is None else torch.split(whole, list(sizes))
            for name, part in zip(names, parts, strict=True):
                yield f"{name}.{kind}", part
