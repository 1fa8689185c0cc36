"""A GGUF header read as a model config."""

import math
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchllm.errors import ModelError
from batchllm.models.config import ModelConfig
from batchllm.models.gguf_file import GGUFFile
from batchllm.text.gguf_tokenizer import gguf_special_ids
from batchllm.text.gguf_values import typed

ROPE_FACTORS = "rope_freqs.weight"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What every Llama 3.1 and 3.2 model was trained with; a GGUF keeps only what follows from it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read_gguf_config(file: GGUFFile) -> ModelConfig:
    """Read the config of a GGUF of one of the `ARCHITECTURES`.

    Raises:
        ModelError: another architecture, or a variation of these that is not implemented.
    """
    metadata, tensors = file.metadata, file.tensors
    if (arch := typed(metadata, "general.architecture", str)) not in ARCHITECTURES:
        raise ModelError(
            f"GGUF architecture {arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if "token_embd.weight" not in tensors:
        raise ModelError("tensor token_embd.weight is missing")
    if _get(metadata, "expert_count"):
        raise ModelError("mixture-of-experts models are not supported")
    rotary = _get(metadata, "rope.dimension_count")
    head_dim = _get(metadata, "attention.key_length", rotary)
    if rotary not in (None, head_dim):
        raise ModelError(f"only {rotary} of {head_dim} dimensions are rotary; not supported")
    if _get(metadata, "attention.value_length", head_dim) != head_dim:
        raise ModelError("keys and values of different sizes are not supported")
    special = gguf_special_ids(metadata)
    base = _number(metadata, "rope.freq_base", 10_000.0)
    return ModelConfig.from_hugging_face(
        {
            "architectures": [ARCHITECTURES[arch]],
            "vocab_size": tensors["token_embd.weight"].shape[0],
            "hidden_size": _get(metadata, "embedding_length"),
            "intermediate_size": _get(metadata, "feed_forward_length"),
            "num_hidden_layers": _get(metadata, "block_count"),
            "num_attention_heads": _get(metadata, "attention.head_count"),
            "num_key_value_heads": _get(metadata, "attention.head_count_kv"),
            "head_dim": head_dim,
            "rms_norm_eps": _get(metadata, "attention.layer_norm_rms_epsilon"),
            "rope_theta": base,
            "rope_scaling": _rope_scaling(file, base),
            "max_position_embeddings": _get(metadata, "context_length"),
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_down.bias" in tensors,
            "bos_token_id": special.bos,
        },
        dtype=_stored_dtype(file),
        eos_token_ids=special.end_of_generation,
    )


def _get(metadata: dict[str, Any], key: str, default: object = None) -> Any:  # noqa: ANN401
    key = f"{metadata['general.architecture']}.{key}"
    value = metadata.get(key, default)
    if isinstance(value, list | np.ndarray):
        raise ModelError(f"{key} differs from layer to layer, which is not supported")
    return value


def _number(metadata: dict[str, Any], key: str, default: float) -> float:
    key = f"{metadata['general.architecture']}.{key}"
    value = typed(metadata, key, float)
    if value is not None and not 0 < value < math.inf:
        raise ModelError(f"{key} is {value}, not a positive number")
    return default if value is None else value


def _stored_dtype(file: GGUFFile) -> str:
    """The type of most weights; block-quantised ones count as bfloat16."""
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[_STORED.get(tensor.type_name, "bfloat16")] += tensor.num_elements
    return sizes.most_common(1)[0][0]


def _rope_scaling(file: GGUFFile, base: float) -> dict[str, Any] | None:
    """The scaling in Hugging Face's words."""
    kind = _get(file.metadata, "rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ModelError(
            f"rope scaling {kind!r} is not supported in a GGUF file; supported: linear, llama3"
        )
    if ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, base)
    factor = _get(file.metadata, "rope.scaling.factor", 1.0)
    return {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1 else None


def _llama3_scaling(file: GGUFFile, base: float) -> dict[str, Any] | None:
    """Recover the parameters behind the factors by which a file divides its frequencies.

    The largest factor is the scaling factor itself; the others must then follow from the constants
    of the Llama 3 family. A file whose factors do not is refused rather than run wrongly.
    """
    tensor = file.tensors[ROPE_FACTORS]
    if tensor.type_name != "F32":
        raise ModelError(f"tensor {ROPE_FACTORS} has type {tensor.type_name}, not F32")
    factors = file.rows(tensor).view(np.float32).reshape(-1)
    factor = float(factors.max())
    if np.all(factors == 1):
        return None
    original = _number(file.metadata, "rope.scaling.original_context_length", 8192)
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        **_LLAMA3,
        "original_max_position_embeddings": int(original),
    }
    expected = _llama3_factors(len(factors), base, factor, original)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise ModelError(
            f"tensor {ROPE_FACTORS} holds frequency factors other than Llama 3's, "
            "which are not supported; use the safetensors checkpoint"
        )
    return scaling


def _llama3_factors(count: int, base: float, factor: float, original: float) -> NDArray[np.float64]:
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    turns = original / (2 * math.pi * base ** (np.arange(count) / count))
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divided: NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return divided
