"""Small models by the compiled kernels, whole and without blocks."""

import torch
from builders import random_weights

from batchllm.models.config import ModelConfig
from batchllm.models.native_operations import NativeOperations
from batchllm.models.registry import make_model


class OneByOne(NativeOperations):
    """The operations, without blocks."""

    def pack_blocks(self, layers, eps):
        return None


def attend(layer, qkv):
    """Something that depends on the layer; in place, as the kernels rotate."""
    qkv.mul_(1 + layer / 8)
    return qkv[:, :4].flatten(1).contiguous()


def make(kind, config, kernels, dtype, quantization):
    """A model of `config` (as `tiny_config` has it), random weights, with operations of a kind."""
    model = make_model(ModelConfig.from_hugging_face(config), dtype, kind(kernels, tiles=False))
    model.load((n, torch.from_numpy(w).to(dtype)) for n, w in random_weights(config).items())
    model.pack(quantization)
    return model
