"""Writes random weights of a known model's shape as a bf16 safetensors directory, for all engines.

They are those of `--load-format dummy`. The tokenizer is the default model's, which every engine
wants to see and none uses: rows are token ids. Prompts are limited to 8,192 tokens, since
vLLM wants room in its KV cache for one that is as long as the model allows.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from batchllm.models.dummy_checkpoint import DummyCheckpoint
from batchllm.models.shapes import PUBLISHED

TOKENIZER = Path(__file__).resolve().parents[2] / ".bench/model"
MODEL_TYPES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
CONTEXT = 8192


def export(shape: str, directory: Path) -> None:
    """Writes weights, config and a tokenizer; the config last, when all else is there."""
    if not (TOKENIZER / "tokenizer.json").exists():
        raise SystemExit(f"{TOKENIZER} is not there; run scripts/bench_setup.sh first")
    weights = DummyCheckpoint.of(shape).weights(torch.bfloat16)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in weights}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, directory / name)
    config = PUBLISHED[shape] | {"max_position_embeddings": CONTEXT, "hidden_act": "silu"}
    config["model_type"] = MODEL_TYPES[config["architectures"][0]]
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Command line: the shape's name, directory to make."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape")
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    export(arguments.shape, arguments.directory)
    print(json.dumps({"written": str(arguments.directory)}))


if __name__ == "__main__":
    main()
