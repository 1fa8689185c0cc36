"""Turns a GGUF file into a bf16 safetensors directory, so that every engine runs the same weights.

The quantised tensors are dequantised by transformers, once; peers that read no GGUF (or read it
with other kernels) then load plain bf16. Run in the transformers environment.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging


def export(gguf: Path, directory: Path) -> None:
    """Writes weights, config and tokenizer of `gguf` into `directory`."""
    folder, name = str(gguf.parent), gguf.name
    # Without dequantize, transformers keeps the weights packed, which can be neither saved nor
    # compared with an engine that computes in bf16.
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=name, dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    """Command line: GGUF file, directory to make."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    export(arguments.gguf, arguments.directory)
    print(f"{arguments.directory}: written from {arguments.gguf}")


if __name__ == "__main__":
    main()
