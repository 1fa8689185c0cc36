"""Which tensors a model must have, under their canonical (Hugging Face) names.

A checkpoint is held against this when it is opened, from the file's header alone, so a missing or
misshapen tensor is told in one line before anything is loaded.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from batchllm.errors import ModelError
from batchllm.models.config import ModelConfig

Shape = tuple[int, ...]
Part = tuple[slice, ...]
"""A part of a tensor, to index it with; `()` is all of it."""

Cut = Callable[[str, Shape], Part | None]
"""(name, shape) to the part of a tensor that is wanted, at most two slices; None is not at all."""

_SAMPLES, _SAMPLE_BYTES = 64, 4096


def whole(name: str, shape: Shape) -> Part:
    """The `Cut` that wants everything."""
    return ()


def part_shape(shape: Shape, part: Part) -> Shape:
    """The shape of a part of a tensor of this shape."""
    cut = [len(range(size)[where]) for size, where in zip(shape, part, strict=False)]
    return (*cut, *shape[len(part) :])


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name → shape of every weight of a Llama-like decoder, in the order of the computation.

    A linear layer's weight is [out_features, in_features]. With tied embeddings there is no
    `lm_head.weight`.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}

    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = (hidden,)
        for name, shape in attention.items():
            tensors[f"{layer}.self_attn.{name}.weight"] = shape
            if config.attention_bias:
                tensors[f"{layer}.self_attn.{name}.bias"] = shape[:1]
        tensors[f"{layer}.self_attn.o_proj.weight"] = (hidden, queries)
        if config.attention_output_bias:
            tensors[f"{layer}.self_attn.o_proj.bias"] = (hidden,)
        tensors[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        for name, shape in mlp.items():
            tensors[f"{layer}.mlp.{name}.weight"] = shape
            if config.mlp_bias:
                tensors[f"{layer}.mlp.{name}.bias"] = shape[:1]
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    return tensors


def check_tensors(config: ModelConfig, found: Mapping[str, Shape], path: Path) -> None:
    """Hold what a checkpoint has against what its config promises.

    Raises:
        ModelError: a tensor is missing, has another shape, or is not part of the architecture (its
            effect would silently be left out).
    """
    if config.num_layers > len(found):  # each has several; told before as many are listed
        raise ModelError(
            f"{path}: the config says {config.num_layers:,} layers, "
            f"but there are only {len(found):,} tensors"
        )
    expected = expected_tensors(config)
    for name, shape in expected.items():
        if name not in found:
            raise ModelError(f"{path}: tensor {name} is missing")
        if found[name] != shape:
            raise ModelError(
                f"{path}: tensor {name} has shape {list(found[name])}, "
                f"but the config says {list(shape)}"
            )
    unknown = [name for name in found if name not in expected]
    if unknown:
        raise ModelError(
            f"{path}: tensor {unknown[0]} is not part of {config.architecture}"
            + (f" (nor are {len(unknown) - 1} others)" if len(unknown) > 1 else "")
        )


def sampled_sha256(path: Path) -> str:
    """A hash of 64 evenly spaced 4 KiB pieces of a file: cheap, and differs for a fine-tune.

    A header says nothing of the weights' values; two checkpoints of one architecture have equal
    headers and sizes.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
