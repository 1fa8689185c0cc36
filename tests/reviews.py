"""Reviews of products, as rows come: shuffled, and some have no text, which is an error."""

import numpy as np
import pyarrow as pa

from batchllm import LLM
from batchllm.integrations.call import GenerateCall

OPTIONS = {"model": "fake", "template": "{{ product }}\n{{ text.strip() }}?", "max_tokens": 6}
RESULTS = ["answer", "finish_reason", "prompt_tokens", "output_tokens", "error"]


def reviews(num_rows, seed=0):
    rng = np.random.default_rng(seed)
    products = [
        f"Product {i}: " + " ".join(map(str, rng.integers(0, 999, rng.integers(5, 80))))
        for i in range(40)  # their tokens do not sort as the texts do
    ]
    of = rng.zipf(1.5, num_rows) % len(products)
    return pa.table(
        {
            "id": np.arange(num_rows),
            "product": [products[i] for i in of],
            "text": [None if i % 97 == 5 else f"review number {i % 500}" for i in range(num_rows)],
        }
    )


def call_of(**options):
    return GenerateCall.of_options(**OPTIONS | options)


def alone(call, table):
    """A table answered by one engine, and what it counted."""
    llm = LLM(call.model.open(), call.config)
    return llm.generate_table(table, call.spec, call.params), llm.metrics
