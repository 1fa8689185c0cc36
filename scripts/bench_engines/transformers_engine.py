"""transformers' own batched `generate`, as a careful user runs it.

Rows are sorted by prompt length and then by output length, so that little is padded; each batch is
padded on the left and runs to the longest output in it, since `generate` can't do otherwise.
Several batch sizes may be given: each is run, and the fastest reported.
"""

import sys
import time

START = time.perf_counter()

from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from contract import Rows, make_parser, report, warm_up_rows  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402


@dataclass(frozen=True, slots=True)
class Timing:
    """One pass over the rows at one batch size."""

    seconds: float
    batch_size: int
    outputs: list[list[int]]


def load(directory: Path) -> LlamaForCausalLM:
    """Loads bf16 weights, and lets no token end a row early."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    return model


@torch.inference_mode()
def generate(model: LlamaForCausalLM, rows: Rows, batch_size: int) -> list[list[int]]:
    """Answers every row greedily; the outputs come in the rows' order."""
    by_length = sorted(range(len(rows)), key=lambda i: (len(rows.prompts[i]), rows.max_tokens[i]))
    outputs: list[list[int]] = [[] for _ in range(len(rows))]
    for first in range(0, len(by_length), batch_size):
        batch = by_length[first : first + batch_size]
        longest = max(len(rows.prompts[i]) for i in batch)
        input_ids = torch.zeros((len(batch), longest), dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for place, i in enumerate(batch):
            input_ids[place, longest - len(rows.prompts[i]) :] = torch.tensor(rows.prompts[i])
            attention_mask[place, longest - len(rows.prompts[i]) :] = 1
        # generate() asks the model for the logits of the last position only.
        answer: torch.Tensor = model.generate(  # type: ignore[misc, assignment]
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max(rows.max_tokens[i] for i in batch),
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        for i, ids in zip(batch, answer[:, longest:].tolist(), strict=True):
            outputs[i] = ids[: rows.max_tokens[i]]
    return outputs


def main() -> None:
    """Command line of contract.py, and the batch sizes to try."""
    parser = make_parser((__doc__ or "").splitlines()[0], model="safetensors directory")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32, 64, 256])
    arguments = parser.parse_args()
    model = load(arguments.model)
    generate(model, warm_up_rows(), 4)
    load_seconds = time.perf_counter() - START
    for order in arguments.order:
        rows = Rows.read(arguments.workload, order)
        timings = []
        for batch_size in arguments.batch_size:
            start = time.perf_counter()
            outputs = generate(model, rows, batch_size)
            timings.append(Timing(time.perf_counter() - start, batch_size, outputs))
            print(f"batch size {batch_size}: {timings[-1].seconds:.1f} s", file=sys.stderr)
        best = min(timings, key=lambda timing: timing.seconds)
        report(
            engine=arguments.name,
            order=order,
            load_seconds=load_seconds,
            engine_seconds=best.seconds,
            rows=rows,
            outputs=best.outputs,
            settings={
                "dtype": "bfloat16",
                "threads": torch.get_num_threads(),
                "batch_size": best.batch_size,
                **{f"seconds_at_{t.batch_size}": round(t.seconds, 3) for t in timings},
            },
            save_tokens=arguments.save_tokens,
        )


if __name__ == "__main__":
    main()
