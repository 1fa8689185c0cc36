"""The engine on a GPU, beside the bound that its own rates set: random weights, token ids.

Products and memory are measured in the same process, so a share of T_opt is of this chip as it is.
Each run is a model shape, a workload of groups, a policy and an attention backend.

    python scripts/bench_gpu.py [--runs full,quick] [--out FILE.json] [--markdown FILE.md]
"""

import argparse
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "datasets"))
from micro import SHAPES, MicroShape, build

from batchllm import LLM, SamplingParams
from batchllm.models.device_operations import DeviceOperations
from batchllm.models.native_operations import NativeOperations
from batchllm.models.shapes import get_config
from batchllm.native.kernels import load_kernels
from batchllm.prefix.plan import plan_requests
from batchllm.request import Request
from batchllm.runner.measure import gemm_rates, read_bandwidth
from batchllm.simulate.bound import Bound, bound
from batchllm.simulate.machine import Machine
from batchllm.simulate.shape import shape_of

_MICRO = SHAPES["400x16"]
WORKLOADS = {
    "400x16": _MICRO,
    "100x16": replace(_MICRO, groups=100),
    "64x4": replace(_MICRO, groups=64, members=4, prefix=1000, own=100, output=200),
    "8x128": replace(_MICRO, groups=8, members=128, prefix=4000, own=50, output=50),
    "1024x1": replace(_MICRO, groups=1024, members=1, prefix=0, own=500, output=100),
    "tiny": SHAPES["tiny"],
}


@dataclass(frozen=True, slots=True)
class Run:
    """What is to be run."""

    model_shape: str
    workload: str
    policy: str = "auto"
    attention_backend: str = "auto"
    overlap: bool = True


@dataclass(frozen=True, slots=True)
class Result:
    """What came out; times in seconds, of a run after a first small one."""

    run: Run
    attention: str
    policy: str
    seconds: float
    tokens_per_second: float
    saved_share: float
    steps: int
    bound_overlap: float
    bound_total: float

    @property
    def share(self) -> float:
        """Of T_opt."""
        return self.bound_overlap / self.seconds


RUNS = {
    "full": [Run("llama-3.1-8b", "400x16")],
    "quick": [
        *(Run("llama-3.1-8b", "100x16", policy) for policy in ("auto", "dfs", "streaming")),
        Run("llama-3.1-8b", "100x16", overlap=False),
        *(
            Run("llama-3.1-8b", "100x16", "auto", backend)
            for backend in ("cuda", "mixed", "flashinfer", "flashinfer-flat")
        ),
        *(
            Run("llama-3.2-1b", workload, policy)
            for workload in ("64x4", "8x128", "1024x1")
            for policy in ("auto", "streaming")
        ),
    ],
    "trial": [Run("smollm2-135m", "tiny", policy) for policy in ("auto", "streaming")],
}


def requests_of(shape: MicroShape) -> list[Request]:
    """A workload's rows."""
    table = build(shape)
    return [
        Request(row, tokens.astype(np.int32), SamplingParams(max_tokens=most, ignore_eos=True))
        for row, (tokens, most) in enumerate(
            zip(
                (value.values.to_numpy() for value in table["token_ids"]),
                table["max_tokens"].to_pylist(),
                strict=True,
            )
        )
    ]


def measured(model_shape: str, device: torch.device) -> Machine:
    """The device's rates for a model's products, and for reading memory."""

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    shape = shape_of(get_config(model_shape), "bfloat16")
    kernels = load_kernels() if device.type == "cpu" else None
    pack = NativeOperations(kernels).pack if kernels else DeviceOperations().pack
    with device:
        rates = gemm_rates(shape, "bfloat16", pack, settle)
        bandwidth = read_bandwidth(settle)
    return Machine(
        name=str(device),
        gemm_rates=rates,
        attention_rate=max(rate for _, rate in rates),
        bandwidth=bandwidth,
        memory=0,
        step_seconds=0.0,
    )


def execute(run: Run, machine: Machine, device: torch.device) -> Result:
    """Load, run a little, then run and time all."""
    llm = LLM(
        load_format="dummy",
        model_shape=run.model_shape,
        policy=run.policy,
        attention_backend=run.attention_backend,
        overlap=run.overlap,
        device=device.type,
        dtype="bfloat16",
    )
    llm.answer(requests_of(replace(WORKLOADS[run.workload], groups=2, output_max=0)))
    requests = requests_of(WORKLOADS[run.workload])
    steps = llm.metrics.steps
    began = time.perf_counter()
    outputs = llm.answer(requests)
    seconds = time.perf_counter() - began
    assert not any(output.error for output in outputs)
    plan = plan_requests(requests)
    longest = np.array([r.sampling_params.max_tokens for r in requests])
    lengths = longest[[plan.rows_of(np.array([leaf]))[0] for leaf in range(plan.tree.num_leaves)]]
    least: Bound = bound(plan.tree, lengths, machine, llm.shape, llm.num_kv_tokens)
    tokens = sum(len(r.prompt_token_ids) for r in requests) + int(longest.sum())
    policy = ", ".join(sorted(llm.chosen_policies)) or run.policy
    result = Result(
        run=run,
        attention=llm.attention + " beside products" * (llm.loaded.overlap is not None),
        policy=policy,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        saved_share=llm.metrics.saved_share,
        steps=llm.metrics.steps - steps,
        bound_overlap=least.overlap,
        bound_total=least.total,
    )
    del llm
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def table(results: list[Result], machines: dict[str, Machine]) -> str:
    """Markdown."""
    lines = [
        "| model | workload | policy | attention | s | tokens/s | saved | T_opt | share of it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        policy = r.run.policy if r.run.policy == r.policy else f"{r.run.policy} ({r.policy})"
        lines.append(
            f"| {r.run.model_shape} | {r.run.workload} | {policy} | {r.attention} | "
            f"{r.seconds:.2f} | {r.tokens_per_second:,.0f} | {r.saved_share:.1%} | "
            f"{r.bound_overlap:.2f} (no overlap: {r.bound_total:.2f}) | {r.share:.0%} |"
        )
    lines.append("")
    for name, machine in machines.items():
        lines.append(
            f"Measured for {name}: products {machine.best_gemm_rate / 1e12:.1f} TFLOP/s at best, "
            f"memory {machine.bandwidth / 1e12:.2f} TB/s."
        )
    return "\n".join(lines)


def main() -> None:
    """Run, print as it goes, and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="quick,full", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    device, began = torch.device(arguments.device), time.perf_counter()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    machines: dict[str, Machine] = {}
    results: list[Result] = []
    for run in [run for kind in arguments.runs.split(",") for run in RUNS[kind]]:
        if time.perf_counter() - began > arguments.seconds:
            print(f"no time left for {run}")
            continue
        if run.model_shape not in machines:
            machines[run.model_shape] = measured(run.model_shape, device)
        results.append(execute(run, machines[run.model_shape], device))
        text = f"{name}\n\n{table(results, machines)}\n"
        if arguments.out:
            arguments.out.write_text(
                json.dumps({"device": name, "runs": list(map(asdict, results))})
            )
        if arguments.markdown:
            arguments.markdown.write_text(text)
        print(results[-1], flush=True)
    print(text)


if __name__ == "__main__":
    main()
