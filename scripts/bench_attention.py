"""Attention alone, on a GPU: our kernel beside FlashInfer's, with and without its cascade.

Each point is a step of decodes: groups of `members` rows, `shared` tokens in common and `private`
of their own, as many groups as make up `--queries` rows. The time is that of a layer, index arrays
planned before; layers take turns so that none finds its KV in a cache of the chip.

    python scripts/bench_attention.py [--out FILE.json] [--markdown FILE.md]
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from batchllm.attention.backend import AttentionBackend, Heads, make_backend
from batchllm.models.rope import Rotation
from batchllm.runner.model_input import AttentionItems, ModelInput
from batchllm.runner.staging import put_now
from batchllm.scheduler.batch import Samples

BLOCK_SIZE = 16
BACKENDS = ("cuda", "flashinfer", "flashinfer-flat")
HEADS = {
    "llama-3.1-8b": Heads(32, 8, 128),
    "qwen2.5-7b": Heads(28, 4, 128),
    "llama-3.2-1b": Heads(32, 8, 64),
}
SHARED = (128, 512, 2000, 8000)
MEMBERS = (4, 16, 64, 256)


@dataclass(frozen=True, slots=True)
class Point:
    """One step, and how many microseconds a layer of it takes by backend."""

    heads: str
    shared: int
    members: int
    groups: int
    private: int
    microseconds: dict[str, float]

    @property
    def ratio(self) -> float:
        """FlashInfer's better time over ours."""
        others = [time for name, time in self.microseconds.items() if name != "cuda"]
        return min(others) / self.microseconds["cuda"]


def decodes(groups: int, members: int, shared: int, private: int) -> ModelInput:
    """A step of one token for each of `members` rows in each of `groups` groups."""
    queries = np.arange(groups * members)
    first = np.arange(groups) * members
    own = np.arange(len(queries) + groups) < len(queries)
    kv_len = np.where(own, private, shared)
    num_blocks = -(-kv_len // BLOCK_SIZE)
    offsets = np.concatenate([[0], np.cumsum(num_blocks)])
    blocks = np.random.default_rng(0).permutation(offsets[-1])
    items = AttentionItems(
        query_begin=np.concatenate([queries, first]),
        query_end=np.concatenate([queries + 1, first + members]),
        kv_start=np.where(own, shared, 0),
        kv_len=kv_len,
        own=own,
        block_offsets=offsets,
        block_ids=blocks,
    )
    last = offsets[queries] + (private - 1) // BLOCK_SIZE
    none = np.zeros(0, dtype=np.int64)
    return ModelInput(
        token_ids=np.zeros(len(queries), dtype=np.int32),
        positions=np.full(len(queries), shared + private - 1),
        slots=blocks[last] * BLOCK_SIZE + (private - 1) % BLOCK_SIZE,
        items=items,
        sample_rows=none,
        samples=Samples(none, none, none, none, none, none, []),
    )


def layer_times(
    step: ModelInput,
    backends: dict[str, AttentionBackend],
    heads: Heads,
    clock: Callable[[Callable[[int], None], int], float],
    device: torch.device,
    layers: int,
) -> dict[str, float]:
    """Microseconds of a layer by backend; `clock` times a call for `layers` layers in seconds."""
    num_tokens, num_blocks = len(step.token_ids), len(step.items.block_ids)
    shape = (layers, 2, num_blocks, BLOCK_SIZE, heads.num_kv_heads, heads.head_dim)
    cache = torch.randn(shape, dtype=torch.bfloat16, device=device)
    width = heads.num_heads + 2 * heads.num_kv_heads
    qkv = torch.randn(num_tokens, width, heads.head_dim, dtype=torch.bfloat16, device=device)
    angles = torch.rand(num_tokens, heads.head_dim // 2, device=device)
    rotation = Rotation(angles.cos(), angles.sin())
    times = {}
    for name, backend in backends.items():
        plan = backend.plan(step, rotation, put_now(device))

        def run(layer: int, plan=plan) -> None:  # noqa: ANN001
            plan.run(qkv, *cache[layer])

        times[name] = clock(run, layers) * 1e6
    return times


def gpu_clock(run: Callable[[int], None], layers: int, turns: int = 5) -> float:
    """Median seconds of a layer, recorded: what the host takes to launch it is not in it."""
    for layer in range(layers):
        run(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            run(layer)
    seconds = []
    for _ in range(turns):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / layers)
    return float(np.median(seconds))


def measure(queries: int, private: int, names: list[str]) -> list[Point]:
    """All points of the table."""
    points = []
    made = {
        (kind, name): make_backend(name, BLOCK_SIZE, heads.head_dim, heads=heads, device="cuda")
        for kind, heads in HEADS.items()
        for name in names
    }
    for (kind, heads), shared, members in itertools.product(HEADS.items(), SHARED, MEMBERS):
        groups = max(1, queries // members)
        backends = {name: made[kind, name] for name in names}
        times = layer_times(
            decodes(groups, members, shared, private),
            backends,
            heads,
            gpu_clock,
            torch.device("cuda"),
            layers=4,
        )
        points.append(Point(kind, shared, members, groups, private, times))
    return points


def table(points: list[Point]) -> str:
    """The points as a Markdown table, and what they come to."""
    names = list(points[0].microseconds)
    lines = [
        f"| heads | shared | members x groups | {' | '.join(names)} (µs a layer) | ratio |",
        f"|{'---|' * (len(names) + 4)}",
    ]
    for point in points:
        times = " | ".join(f"{point.microseconds[name]:.1f}" for name in names)
        groups = f"{point.members} x {point.groups}"
        ratio = f"{point.ratio:.2f}"
        lines.append(f"| {point.heads} | {point.shared:,} | {groups} | {times} | {ratio} |")
    ratios = sorted(point.ratio for point in points)
    lines.append("")
    lines.append(
        f"Better FlashInfer over ours: {ratios[0]:.2f} at least, {np.median(ratios):.2f} at the "
        f"median, {ratios[-1]:.2f} at most."
    )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=512, help="rows in a step")
    parser.add_argument("--private", type=int, default=200, help="tokens of a row's own")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    points = measure(arguments.queries, arguments.private, arguments.backends.split(","))
    print(table(points))
    if arguments.out:
        results = {"gpu": torch.cuda.get_device_name(), "points": [asdict(p) for p in points]}
        arguments.out.write_text(json.dumps(results, indent=1))
    if arguments.markdown:
        arguments.markdown.write_text(f"{torch.cuda.get_device_name()}\n\n{table(points)}\n")


if __name__ == "__main__":
    main()
