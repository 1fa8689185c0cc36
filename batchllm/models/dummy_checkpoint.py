"""`load_format="dummy"`: a known model's architecture and sizes with random weights.

A step takes as long as the real model's, so speed can be measured where no weights can be had. The
answers are noise, but always the same noise.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from batchllm.errors import UsageError
from batchllm.models.config import ModelConfig
from batchllm.models.gguf_checkpoint import GGUFCheckpoint
from batchllm.models.layout import Cut, expected_tensors, whole
from batchllm.models.registered import (
    DEFAULT_MODEL,
    REGISTERED,
    default_cache_dir,
    find_registered,
)
from batchllm.models.shapes import CONFIGS, get_config
from batchllm.request import TokenIds
from batchllm.text.id_tokenizer import id_tokenizer
from batchllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

DUMMY = "dummy"
_RECIPE = "1"  # of the weights; another one would give other answers


class DummyCheckpoint:
    """Opened without a file (see `Checkpoint`); `shape` is what `config` is called.

    It has no tokenizer of its own. Prompts are token ids, or text that another model's tokenizer
    makes ids of; an answer's text is its ids in digits, since they mean nothing.
    """

    about = (
        "the weights are random: answers are noise, given as token ids; "
        f"text is tokenized as for {DEFAULT_MODEL}"
    )

    def __init__(self, shape: str, config: ModelConfig) -> None:
        self.path = Path(f"{DUMMY}-{shape}")
        self.config = config
        self.shape = shape

    @classmethod
    def of(cls, shape: str | None) -> "DummyCheckpoint":
        """The model of a known shape.

        Raises:
            UsageError: there is none of that name.
        """
        if shape is None:
            raise UsageError(
                f"load format {DUMMY} makes random weights for a model shape, but none is given; "
                f"there are: {', '.join(CONFIGS)}"
            )
        return cls(shape, get_config(shape))

    def tokenizer(self) -> Tokenizer:
        return self._ids

    def text_tokenizer(self) -> Tokenizer:
        """The default model's, all of whose ids these models have as well.

        Raises:
            UsageError: it is not on this machine.
        """
        path = find_registered(REGISTERED[DEFAULT_MODEL], default_cache_dir())
        if path is None:
            raise UsageError(
                f"a {DUMMY} model has no tokenizer, and the one that is used for text, of "
                f"{DEFAULT_MODEL}, is not on this machine; give token ids, or get it with "
                "`batchllm models pull`"
            )
        return GGUFCheckpoint(path).tokenizer()

    def random_token_ids(self, count: int) -> TokenIds:
        """Some, int32 [count], always the same."""
        drawn = np.random.default_rng(0).integers(self.config.vocab_size, size=count)
        return drawn.astype(np.int32)

    def weights(
        self, dtype: "torch.dtype | None" = None, cut: Cut = whole
    ) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield (canonical name, tensor) one at a time, made on torch's default device."""
        import torch

        from batchllm.models.random_weights import random_tensors

        stored: torch.dtype = getattr(torch, self.config.dtype)
        for name, tensor in random_tensors(expected_tensors(self.config), dtype or stored):
            if (part := cut(name, tuple(tensor.shape))) is not None:
                yield name, tensor[part]

    def identity(self) -> dict[str, str]:
        return {"format": DUMMY, "shape": self.shape, "weights": _RECIPE}

    @cached_property
    def _ids(self) -> Tokenizer:
        return id_tokenizer(self.config.vocab_size, self.config.eos_token_ids)
