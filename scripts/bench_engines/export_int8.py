"""Turns the bf16 safetensors directory into an int8 one (W8A8) for vLLM, without calibration.

Every linear layer's weight is rounded to int8 with one scale an output channel; activations are
quantised by vLLM as it runs, one scale a token. This is the `compressed-tensors` form of what
llm-compressor calls a dynamic W8A8 scheme, which vLLM's CPU kernels read. Embedding and head stay
bf16. Run in an environment that has torch and safetensors.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

# What vLLM reads: 8 bits for weights by channel and for activations by token.
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds weight [outputs, inputs] to int8, and gives its scales, float32 [outputs, 1]."""
    exact = weight.float()
    scale = exact.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return torch.round(exact / scale).to(torch.int8), scale


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is the weight of one of the layers' matrix products."""
    return name.endswith("_proj.weight") and tensor.ndim == 2


def export(source: Path, target: Path) -> None:
    """Writes config, tokenizer and quantised weights of `source` into `target`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if is_linear(name, tensor):
            tensors[name], tensors[f"{name}_scale"] = quantise(tensor)
        else:
            tensors[name] = tensor
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Command line: bf16 directory, directory to make."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    export(arguments.source, arguments.target)
    print(json.dumps({"written": str(arguments.target)}))


if __name__ == "__main__":
    main()
