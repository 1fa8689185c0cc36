"""A model directory in the Hugging Face layout: config, tokenizer, safetensors.

Headers are parsed here and held against the files' sizes, so that a truncated download is told when
the model is opened. Pickled weights (`.bin`) are refused: loading one runs whatever code it holds.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchllm.errors import ModelError
from batchllm.models.config import ModelConfig, token_ids
from batchllm.models.layout import Cut, check_tensors, sampled_sha256, whole
from batchllm.text.tokenizer import Tokenizer, first_line, read_json

if TYPE_CHECKING:
    import torch

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_MAX_HEADER_BYTES = 100_000_000
# Buffers that old checkpoints saved though they follow from the config.
_DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")
_IDENTITY_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    file: Path
    shape: tuple[int, ...]
    dtype: str


class SafetensorsCheckpoint:
    """An opened model directory (see `Checkpoint`).

    Raises:
        ModelError: a file is missing, damaged, or of a kind not supported.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tokenizer: Tokenizer | None = None
        values = read_json(path / "config.json")
        try:
            # The config alone first: an unsupported family is the better reason to give.
            ModelConfig.from_hugging_face(values)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None
        if not (path / "tokenizer.json").is_file():
            raise ModelError(f"{path}: tokenizer.json is missing")
        self._files = _weight_files(path)
        found = {n: t for file in self._files for n, t in _read_header(file).items()}
        tied = bool(values.get("tie_word_embeddings", False))
        self._tensors = {
            name: tensor
            for name, tensor in found.items()
            if not name.endswith(_DERIVED) and not (tied and name == "lm_head.weight")
        }
        try:
            self.config = ModelConfig.from_hugging_face(
                values,
                dtype=_stored_dtype(self._tensors),
                eos_token_ids=_generation_eos_token_ids(path),
            )
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None
        check_tensors(self.config, {n: t.shape for n, t in self._tensors.items()}, path)

    def tokenizer(self) -> Tokenizer:
        self._tokenizer = self._tokenizer or Tokenizer.from_directory(
            self.path, eos_token_ids=self.config.eos_token_ids
        )
        return self._tokenizer

    def weights(
        self, dtype: "torch.dtype | None" = None, cut: Cut = whole
    ) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield (canonical name, tensor) one at a time, as stored or converted to `dtype`."""
        from safetensors import SafetensorError, safe_open

        for path in self._files:
            names = [name for name, tensor in self._tensors.items() if tensor.file == path]
            try:
                opened = safe_open(path, framework="pt")
            except SafetensorError as error:  # holds headers against more than we do
                raise ModelError(f"{path}: cannot be read: {first_line(error)}") from None
            with opened as file:
                for name in names:
                    part = cut(name, self._tensors[name].shape)
                    if part is not None:  # the tensor is a map of the file: the rest is not read
                        value = file.get_tensor(name)[part]
                        yield name, value if dtype is None else value.to(dtype)

    def identity(self) -> dict[str, str]:
        identity = {"format": "safetensors"}
        for name in _IDENTITY_FILES:
            if (self.path / name).is_file():
                content = (self.path / name).read_bytes()
                identity[f"{name}_sha256"] = hashlib.sha256(content).hexdigest()
        for file in self._files:
            identity[f"{file.name}_bytes"] = str(file.stat().st_size)
            identity[f"{file.name}_header_sha256"] = _header_sha256(file)
            identity[f"{file.name}_sample_sha256"] = sampled_sha256(file)
        return identity


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if (single := directory / "model.safetensors").is_file():
        return [single]
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise ModelError(f"{index}: has no weight_map")
        files = [directory / name for name in sorted(set(names.values()))]
        for file in files:
            if file.parent != directory or not _is_file(file):
                raise ModelError(f"{directory}: {file.name}, named in the index, is missing")
        return files
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        raise ModelError(
            f"{directory}: has pickled weights only, which are not loaded because a pickle can run "
            "any code; convert them to safetensors"
        )
    raise ModelError(f"{directory}: no weights, model.safetensors is missing")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no file can have such a name
        return False


def _read_header(path: Path) -> dict[str, _StoredTensor]:
    """A safetensors file's tensors by name, each checked to lie within the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelError(f"{path}: truncated, or not a safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [(n, t["dtype"], t["shape"], t["data_offsets"]) for n, t in header.items()]
            tensors = {}
            for name, dtype, shape, (start, end) in entries:
                if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
                    raise ValueError(name)
                tensors[name] = _StoredTensor(path, tuple(shape), dtype)
                expected = math.prod(shape) * _BYTES.get(dtype, 0)
                if end - start < expected:
                    raise ValueError(name)
                if 8 + length + end > size:
                    raise ModelError(
                        f"{path}: the file is truncated: it has {size:,} bytes, but tensor {name} "
                        f"ends at byte {8 + length + end:,}"
                    )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ModelError(f"{path}: the safetensors header is damaged") from None
    return tensors


def _header_sha256(path: Path) -> str:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return hashlib.sha256(file.read(length)).hexdigest()


def _stored_dtype(tensors: dict[str, _StoredTensor]) -> str:
    """The type of the embeddings, which every model has; all others must be known as well."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ModelError(
                f"tensor {name} has type {tensor.dtype}; supported: {', '.join(_DTYPES)}"
            )
    embeddings = tensors.get("model.embed_tokens.weight")
    return _DTYPES[embeddings.dtype] if embeddings else "float32"


def _generation_eos_token_ids(directory: Path) -> tuple[int, ...] | None:
    values = read_json(directory / "generation_config.json", required=False)
    return token_ids(values.get("eos_token_id"), "eos_token_id") or None
