"""What a model is, read from a Hugging Face style config: plain numbers, no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from batchllm.errors import ModelError

_LLAMA, _QWEN2 = "LlamaForCausalLM", "Qwen2ForCausalLM"
SUPPORTED_ARCHITECTURES = (_LLAMA, _QWEN2)
STORED_DTYPES = ("bfloat16", "float16", "float32")
_MAX_WINDOW_LAYERS = 28  # where a Qwen 2 config does not say
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length the model was first trained on.

    `linear` divides every frequency by `factor`. `llama3` divides by `factor` those whose
    wavelength exceeds `original_max_position_embeddings / low_freq_factor`, leaves those below
    `original_max_position_embeddings / high_freq_factor`, and interpolates between; the last
    three fields are for `llama3` alone.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ModelError(f"rope scaling factor is {self.factor}; it must be positive")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ModelError(
                f"rope scaling has low_freq_factor {self.low_freq_factor} and high_freq_factor "
                f"{self.high_freq_factor}; the first must be positive and the smaller"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder, and the ids that begin and end its text.

    `attention_bias` says whether queries, keys and values have one, `attention_output_bias` whether
    what attention is multiplied with after has one.
    `dtype` names the type the weights are stored in ("bfloat16" for block-quantised files).
    `eos_token_ids` is empty where only the tokenizer knows them: ask `Tokenizer.eos_token_ids`.

    Raises:
        ModelError: a value is missing, impossible, or of a kind batchllm does not implement.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    def __post_init__(self) -> None:
        if self.architecture not in SUPPORTED_ARCHITECTURES:
            raise ModelError(
                f"architecture {self.architecture!r} is not supported; "
                f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ModelError(f"model config: {name} is {getattr(self, name)}, not positive")
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"model config: {self.num_heads} attention heads cannot be divided among "
                f"{self.num_kv_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise ModelError(f"model config: head_dim {self.head_dim} is odd; rotary needs it even")
        if self.dtype not in STORED_DTYPES:
            raise ModelError(
                f"weights of type {self.dtype!r} are not supported; "
                f"supported: {', '.join(STORED_DTYPES)}"
            )

    @classmethod
    def from_hugging_face(
        cls,
        values: Mapping[str, Any],
        *,
        dtype: str | None = None,
        eos_token_ids: tuple[int, ...] | None = None,
    ) -> "ModelConfig":
        """Read a `config.json`, in the style of transformers 5 or of the versions before.

        Args:
            values: the parsed file.
            dtype: what the weights really are; the file's word is taken where it is not given.
            eos_token_ids: overrides the file's, since `generation_config.json` goes before it.
        """
        _refuse_what_is_not_implemented(values)
        architecture = _architecture(values)
        hidden_size = _integer(values, "hidden_size")
        num_heads = _integer(values, "num_attention_heads")
        if eos_token_ids is None:
            eos_token_ids = token_ids(values.get("eos_token_id"), "eos_token_id")
        bos = token_ids(values.get("bos_token_id"), "bos_token_id")
        rope = _mapping(values, "rope_parameters")
        biases = _biases(values, architecture)
        return cls(
            architecture=architecture,
            vocab_size=_integer(values, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(values, "intermediate_size"),
            num_layers=_integer(values, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_integer(values, "num_key_value_heads", num_heads),
            head_dim=_integer(values, "head_dim", hidden_size // max(1, num_heads)),
            rms_norm_eps=_number(values, "rms_norm_eps", 1e-6),
            rope_theta=_number(rope, "rope_theta", _number(values, "rope_theta", 10_000.0)),
            rope_scaling=_rope_scaling(rope or _mapping(values, "rope_scaling")),
            max_position_embeddings=_integer(values, "max_position_embeddings", 2048),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            attention_bias=biases.attention,
            attention_output_bias=biases.attention_output,
            mlp_bias=biases.mlp,
            dtype=dtype or values.get("dtype") or values.get("torch_dtype") or "float32",
            eos_token_ids=eos_token_ids,
            bos_token_id=bos[0] if bos else None,
        )


def token_ids(value: object, name: str) -> tuple[int, ...]:
    """A config's one id, list of ids or null as a tuple."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 2**31 for i in ids):
        raise ModelError(f"model config: {name} is {value!r}, not a token id or a list of them")
    return tuple(ids)


def _architecture(values: Mapping[str, Any]) -> str:
    names = values.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(
            f"model config: architectures is {names!r}; it must name one, "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    if names[0] not in SUPPORTED_ARCHITECTURES:
        raise ModelError(
            f"architecture {names[0]!r} is not supported; "
            f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return names[0]


@dataclass(frozen=True, slots=True)
class _Biases:
    attention: bool
    attention_output: bool
    mlp: bool


def _biases(values: Mapping[str, Any], architecture: str) -> _Biases:
    """Where there are any; Qwen2's config does not say, its architecture does."""
    if architecture == _QWEN2:
        return _Biases(attention=True, attention_output=False, mlp=False)
    attention = bool(values.get("attention_bias", False))
    return _Biases(attention, attention, mlp=bool(values.get("mlp_bias", False)))


def _refuse_what_is_not_implemented(values: Mapping[str, Any]) -> None:
    _architecture(values)  # first, so that another family's config is not blamed for a detail
    if values.get("quantization_config"):
        method = _mapping(values, "quantization_config").get("quant_method", "unknown")
        raise ModelError(
            f"the checkpoint is quantised ({method}), which is not supported; "
            "use the unquantised safetensors, or a GGUF file"
        )
    if (activation := values.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ModelError(f"model config: activation {activation!r} is not supported, only silu")
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ModelError("model config: partial rotary embeddings are not supported")
    _refuse_partial_attention(values)


def _refuse_partial_attention(values: Mapping[str, Any]) -> None:
    """Refuse layers that do not see all of their context; Qwen 2's configs can ask for such."""
    layer_types = values.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise ModelError("model config: layer_types has others than full_attention, not supported")
    if values.get("dual_chunk_attention_config"):
        raise ModelError("model config: dual chunk attention is not supported")
    window = values.get("sliding_window")
    if layer_types is not None or window is None or not values.get("use_sliding_window", False):
        return  # as in transformers, the types go before the switch, which goes before the window
    first = _integer(values, "max_window_layers", _MAX_WINDOW_LAYERS)
    if first < _integer(values, "num_hidden_layers"):
        raise ModelError(
            f"model config: layers from {first} on attend to a sliding window of {window!r}, "
            "which is not supported"
        )


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=_number(rope, "factor"))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=_number(rope, "factor"),
            low_freq_factor=_number(rope, "low_freq_factor"),
            high_freq_factor=_number(rope, "high_freq_factor"),
            original_max_position_embeddings=_integer(rope, "original_max_position_embeddings"),
        )
    raise ModelError(f"rope scaling {kind!r} is not supported; supported: linear, llama3")


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key) or {}
    if not isinstance(value, Mapping):
        raise ModelError(f"model config: {key} is {value!r}, not an object")
    return value


def _integer(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"model config: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"model config: {key} is {value!r}, not a whole number")
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise ModelError(f"model config: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"model config: {key} is {value!r}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ModelError(f"model config: {key} is {value!r}, not a finite number")
    return number
