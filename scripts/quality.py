"""What eight bits cost: perplexity, next tokens and answers beside those of the model without.

The text is the example table's (the Constitution of the United States), each section read from its
beginning. Answers are greedy, to the example's questions.

    python scripts/quality.py [--model MODEL] [--rows N] [--ways 'fp8,KV fp8']
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from batchllm import LLM, SamplingParams
from batchllm.prefix.plan import plan_tokens
from batchllm.runner.model_input import build_model_input

EXAMPLE = Path(__file__).parent.parent / "datasets" / "example.parquet"
ANSWER_TOKENS = 64
WAYS: dict[str, dict[str, str]] = {
    "none": {},
    "int8": {"quantization": "int8"},
    "fp8": {"quantization": "fp8"},
    "KV fp8": {"kv_cache_dtype": "fp8"},
    "KV int8": {"kv_cache_dtype": "int8"},
    "int8 and KV int8": {"quantization": "int8", "kv_cache_dtype": "int8"},
}


@dataclass(frozen=True, slots=True)
class Reading:
    """Of each text token but the first: its -log probability, and whether the model's favourite."""

    loss: NDArray[np.float64]
    favourite: NDArray[np.int64]

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.loss.mean()))


def read(llm: LLM, texts: list[str]) -> Reading:
    """Run the texts through the model, one after the other, and look at every token's logits."""
    losses, favourites = [], []
    for one in texts:
        ragged = llm.tokenizer.encode_batch([one], add_special_tokens=False)
        text = ragged.values
        scheduler = llm.new_scheduler()
        scheduler.add(plan_tokens(ragged, [SamplingParams(max_tokens=1)], np.zeros(1, int)))
        batch = scheduler.schedule()
        assert batch.num_tokens == len(text), "a text must fit a step"
        step = build_model_input(batch, llm.config.block_size)
        logits = llm.runner.logits(replace(step, sample_rows=np.arange(len(text))))[:-1].float()
        actual = torch.from_numpy(text[1:].astype(np.int64))
        losses.append(torch.nn.functional.cross_entropy(logits, actual, reduction="none").numpy())
        favourites.append(logits.argmax(dim=1).numpy())
    return Reading(np.concatenate(losses).astype(np.float64), np.concatenate(favourites))


def answers(llm: LLM, table: pa.Table) -> list[list[int]]:
    """Greedy answers to the example's questions, as token ids."""
    prompts = [f"{r['text']}\n\n{r['question']}" for r in table.to_pylist()]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=ANSWER_TOKENS))
    return [output.output_token_ids.tolist() for output in outputs]


def agreement(one: list[int], other: list[int]) -> int:
    """How many tokens two answers have in common before they part."""
    same = [a == b for a, b in zip(one, other, strict=False)]
    return same.index(False) if False in same else len(same)


def main() -> None:
    """Read and answer with and without each way of rounding, and print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the default model")
    parser.add_argument("--rows", type=int, help="of the example to answer, default: all")
    parser.add_argument("--ways", help=f"of {', '.join(WAYS)}; default: all")
    arguments = parser.parse_args()
    table = pq.read_table(EXAMPLE)
    sections = sorted(set(table["text"].to_pylist()))
    table = table.slice(0, arguments.rows)
    plain = None
    for name, options in WAYS.items():
        if arguments.ways and name not in ("none", *arguments.ways.split(",")):
            continue
        llm = LLM(arguments.model, **options)
        reading, given = read(llm, sections), answers(llm, table)
        title = llm.dtype if name == "none" else name
        print(
            f"{title:>14}: perplexity {reading.perplexity:.4f} over {len(reading.loss):,} tokens "
            f"in {len(sections)} sections"
        )
        if plain is None:
            plain = reading, given
        else:
            print(compare(*plain, reading, given))


def compare(
    plain: Reading, plain_answers: list[list[int]], reading: Reading, given: list[list[int]]
) -> str:
    """What a way of rounding changes."""
    increase = reading.perplexity / plain.perplexity - 1
    same = (plain.favourite == reading.favourite).mean()
    common = [agreement(a, b) for a, b in zip(plain_answers, given, strict=True)]
    alike = sum(a == b for a, b in zip(plain_answers, given, strict=True))
    length = np.mean([len(a) for a in plain_answers])
    return (
        f"{'':>16}{increase:+.2%}; the likeliest next token is the same at {same:.2%}; greedy "
        f"answers of up to {ANSWER_TOKENS} tokens: {alike} of {len(common)} the same to the end, "
        f"{np.mean(common):.1f} of {length:.1f} tokens before they part"
    )


if __name__ == "__main__":
    main()
