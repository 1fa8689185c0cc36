"""A model in one GGUF file: config, weights, tokenizer and chat template all come out of it.

Differences from the Hugging Face layout that are undone here: tensor names, and the row order of
Llama's `q_proj` and `k_proj`, which llama.cpp's converter interleaves for its own rotary layout
(Qwen 2's stay as they are). Rows are reordered while still quantised, since a row is a whole number
of blocks.
"""

import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from batchllm.errors import ModelError
from batchllm.models.gguf_config import ARCHITECTURES, ROPE_FACTORS, read_gguf_config
from batchllm.models.gguf_file import GGUFFile, GGUFTensor
from batchllm.models.layout import (
    Cut,
    Part,
    check_tensors,
    part_shape,
    sampled_sha256,
    whole,
)
from batchllm.text.gguf_tokenizer import tokenizer_from_gguf
from batchllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_Index = NDArray[np.intp] | slice
_TENSOR_NAME = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")
# Enough elements that numpy's overhead vanishes, few enough that a chunk stays in the cache.
_CHUNK_ELEMENTS = 1 << 18
_COPY_ELEMENTS = 1 << 15
_MOST_THREADS = 8  # that dequantise, each a tensor that must have room


class GGUFCheckpoint:
    """An opened GGUF file (see `Checkpoint`).

    Raises:
        ModelError: truncated, not GGUF, or an architecture, tensor type or rope scaling that is not
            implemented.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tokenizer: Tokenizer | None = None
        self._file = GGUFFile(path)
        try:
            self.config = read_gguf_config(self._file)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None
        self._tensors = {
            _canonical_name(name): tensor
            for name, tensor in self._file.tensors.items()
            if name != ROPE_FACTORS
        }
        check_tensors(self.config, {n: t.shape for n, t in self._tensors.items()}, path)
        for tensor in self._tensors.values():
            if not can_dequantize(tensor):
                raise ModelError(
                    f"{path}: tensor {tensor.name} has type {tensor.type_name}, "
                    "which cannot be dequantised here"
                )

    def tokenizer(self) -> Tokenizer:
        try:
            self._tokenizer = self._tokenizer or tokenizer_from_gguf(self._file.metadata)
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}") from None
        return self._tokenizer

    def weights(
        self, dtype: "torch.dtype | None" = None, cut: Cut = whole
    ) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield (canonical name, tensor) one at a time, dequantised to `dtype` (or float32).

        The next few are dequantised meanwhile, each by a thread of its own.
        """
        import torch

        threads = min(torch.get_num_threads(), _MOST_THREADS)
        coming: deque[tuple[str, Future[torch.Tensor]]] = deque()
        with ThreadPoolExecutor(threads) as pool:
            for name, tensor in self._tensors.items():
                part = cut(name, tensor.shape)
                if part is None:
                    continue
                if len(coming) == threads:
                    ready, weight = coming.popleft()
                    yield ready, weight.result()
                kind = dtype or torch.float32
                coming.append((name, pool.submit(self._weight, name, tensor, part, kind)))
            for ready, weight in coming:
                yield ready, weight.result()

    def _weight(
        self, name: str, tensor: GGUFTensor, part: Part, dtype: "torch.dtype"
    ) -> "torch.Tensor":
        import torch

        # Piece by piece, so not where torch's default would have it.
        out = torch.empty(part_shape(tensor.shape, part), dtype=dtype, device="cpu")
        flat = out.view(-1)
        rows, columns = self._places(name, tensor, part)
        start = 0
        for chunk in dequantized_chunks(self._file.rows(tensor)[rows], tensor):
            # In pieces too small for torch to use threads: meeting at a barrier a thousand times
            # costs more than it gains, and ten times more when the cores are shared.
            values = torch.from_numpy(chunk[:, columns].reshape(-1))
            for i in range(0, len(values), _COPY_ELEMENTS):
                piece = values[i : i + _COPY_ELEMENTS]
                flat[start + i : start + i + len(piece)] = piece
            start += len(values)
        return out

    def _places(self, name: str, tensor: GGUFTensor, part: Part) -> tuple[_Index, _Index]:
        """Which rows, and what of each, are a part of a tensor in the file."""
        wanted, columns = (*part, slice(None), slice(None))[:2]
        rows: _Index = wanted
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
        is_mixed = self.config.architecture == ARCHITECTURES["llama"]
        if is_mixed and (layer := name.split(".")[-2]) in heads:
            rows = hugging_face_row_order(heads[layer], self.config.head_dim)[wanted]
        if len(tensor.shape) == 1:  # a bias is stored as one row
            return slice(None), rows
        return rows, columns

    def identity(self) -> dict[str, str]:
        return {
            "format": "gguf",
            "file": self.path.name,
            "bytes": str(self._file.num_bytes),
            "header_sha256": self._file.header_sha256,
            "sample_sha256": sampled_sha256(self.path),
        }


def hugging_face_row_order(num_heads: int, head_dim: int) -> NDArray[np.intp]:
    """Where in the file each Hugging Face row of `q_proj` or `k_proj` is, [num_heads * head_dim].

    Within a head, the file pairs row i of the first half with row i of the second:
    0, h/2, 1, h/2 + 1, …
    """
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def can_dequantize(tensor: GGUFTensor) -> bool:
    """Whether `dequantized_chunks` knows the tensor's type."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType(tensor.type_id)
    return kind.name in ("F32", "F16") or hasattr(getattr(quants, kind.name, None), "block_size")


def dequantized_chunks(
    rows: NDArray[np.uint8], tensor: GGUFTensor
) -> Iterator[NDArray[np.float32]]:
    """A tensor's values in order, as fresh float32 [some rows, row length] arrays of about 1 MiB.

    `rows` are its stored bytes, uint8 [rows, bytes per row].
    """
    from gguf import quants

    width = tensor.shape[-1]
    step = max(1, _CHUNK_ELEMENTS // width)
    for start in range(0, len(rows), step):
        stored = np.ascontiguousarray(rows[start : start + step])
        if tensor.type_name == "F32":
            # A copy, because a view of the map is read-only, which torch refuses.
            values = stored.view(np.float32).copy()
        elif tensor.type_name == "F16":
            values = stored.view(np.float16).astype(np.float32)
        else:
            quant = getattr(quants, tensor.type_name)
            quant.init_grid()
            # Straight to the block routine: `quants.dequantize` works on 16 rows at a time.
            values = quant.dequantize_blocks(stored.reshape(-1, quant.type_size))
        yield values.reshape(-1, width)


def _canonical_name(name: str) -> str:
    match = _TENSOR_NAME.fullmatch(name)
    if match is None or match["part"] not in _NAMES:
        return name  # left as it is, for `check_tensors` to refuse by its own name
    layer = "" if match["layer"] is None else f"model.layers.{match['layer']}."
    return f"{layer}{_NAMES[match['part']]}.{match['kind']}"
