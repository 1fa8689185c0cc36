"""batchllm through its Python API; it gets the same GGUF the peers' weights were exported from.

Or random weights of a known model's shape, to be measured where there are no weights:

    python scripts/bench_engines/batchllm_engine.py micro.parquet --name ours \
        --model-shape llama-3.1-8b --kv-memory 40GiB
"""

import time

START = time.perf_counter()

from contract import KV_CACHE_BYTES, Rows, make_parser, report, warm_up_rows  # noqa: E402

from batchllm import LLM, SamplingParams  # noqa: E402
from batchllm.config import parse_size  # noqa: E402


def generate(llm: LLM, rows: Rows) -> list[list[int]]:
    """Answers every row greedily, for exactly as many tokens as it asks."""
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in rows.max_tokens]
    return [output.output_token_ids.tolist() for output in llm.generate(rows.prompts, params)]


def main() -> None:
    """Command line of contract.py."""
    parser = make_parser(
        (__doc__ or "").splitlines()[0], model="GGUF file or directory", needs_model=False
    )
    parser.add_argument("--model-shape", help="random weights of this shape instead of --model")
    parser.add_argument("--quantization", help="int8, or else the weights as they are")
    parser.add_argument("--kv-cache-dtype", default="auto", help="as batchllm run takes it")
    parser.add_argument("--kv-memory", type=parse_size, default=KV_CACHE_BYTES, help="like 4GiB")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.model_shape is None):
        parser.error("give one of --model and --model-shape")
    llm = LLM(
        arguments.model,
        load_format="auto" if arguments.model_shape is None else "dummy",
        model_shape=arguments.model_shape,
        kv_memory=arguments.kv_memory,
        quantization=arguments.quantization,
        kv_cache_dtype=arguments.kv_cache_dtype,
    )
    generate(llm, warm_up_rows())
    load_seconds = time.perf_counter() - START
    for order in arguments.order:
        rows = Rows.read(arguments.workload, order)
        start = time.perf_counter()
        outputs = generate(llm, rows)
        report(
            engine=arguments.name,
            order=order,
            load_seconds=load_seconds,
            engine_seconds=time.perf_counter() - start,
            rows=rows,
            outputs=outputs,
            settings={
                "model": llm.checkpoint.path.name,
                "dtype": llm.dtype,
                "quantization": arguments.quantization,
                "kv_cache_dtype": arguments.kv_cache_dtype,
                "kv_memory": arguments.kv_memory,
            },
            save_tokens=arguments.save_tokens,
        )


if __name__ == "__main__":
    main()
