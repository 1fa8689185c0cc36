"""The least time a machine could need for a workload: the bound every benchmark is held against.

Arithmetic: each distinct prompt token and each decoded token goes through the body once, each
sampled token through the head once. Memory: each decode step reads the KV of its sequences, shared
KV once for all members, and each step reads the weights. The machine's two rates are measured in
the same run (rates.py). `overlap` lets arithmetic and memory run at the same time; `total` doesn't.
No engine can beat `overlap` at those rates, so a share of it is an honest mark.

Only numpy; nothing of batchllm, so that the yardstick does not depend on what it measures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a Llama model; `bytes_per_value` holds for weights and KV alike (2 for bf16)."""

    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    bytes_per_value: int = 2

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The five products of a forward pass, as (inputs, outputs); all but `head` per layer."""
        heads = self.q_heads * self.head_dim
        return {
            "qkv": (self.hidden, heads + 2 * self.kv_heads * self.head_dim),
            "out": (heads, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
            "head": (self.hidden, self.vocab),
        }

    @property
    def body_parameters(self) -> int:
        """P_body: weights of all layers' matrices (norms are left out: a ten-thousandth)."""
        return self.layers * sum(a * b for name, (a, b) in self.matrices.items() if name != "head")

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def weight_bytes(self) -> int:
        return (self.body_parameters + self.head_parameters) * self.bytes_per_value

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values: kv = 2 · layers · kv_heads · head_dim · bytes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_value


SMOLLM2_135M = ModelShape(
    layers=30, hidden=576, intermediate=1536, q_heads=9, kv_heads=3, head_dim=64, vocab=49_152
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the machine did in this run: `flops` in FLOP/s, `bandwidth` in bytes/s."""

    flops: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Segment:
    """Prompt tokens at positions [start, end) that the same rows share, and their decode steps.

    `decode_steps` is the largest among those rows: decoded side by side, they read the segment
    once a step for as long as the longest of them runs.
    """

    start: int
    end: int
    decode_steps: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a workload asks of a machine, in tokens, with every shared token counted once.

    `tree_tokens` is N_pf, `decode_tokens` N_dec; `attended_positions` sums over the tree's tokens
    how many keys each attends to (its position, from 1); `kv_tokens_read` sums over all decode
    steps the KV tokens that must be read.
    """

    tree_tokens: int
    decode_tokens: int
    output_tokens: int
    longest_output: int
    attended_positions: int
    kv_tokens_read: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """T_opt in seconds, and what it is made of."""

    gemm: float
    attention: float
    kv_read: float
    weight_read: float
    steps: int

    @property
    def overlap(self) -> float:
        """T_opt = max(T_gemm + T_attn, (KV bytes + weight bytes) / B)."""
        return max(self.gemm + self.attention, self.kv_read + self.weight_read)

    @property
    def total(self) -> float:
        """The bound without overlap: the sum of both sides."""
        return self.gemm + self.attention + self.kv_read + self.weight_read


def prefix_segments(prompts: Sequence[TokenIds], outputs: Sequence[int]) -> list[Segment]:
    """Cuts the prompts' prefix tree into segments that are shared by the same rows throughout.

    In sorted order the rows below a tree node are neighbours, and the common-prefix lengths of
    neighbours tell where nodes begin and end. An open stack of (start, decode steps so far) is
    closed down to the common prefix with the next row; a closed part is one segment.
    """
    if len(prompts) != len(outputs):
        raise ValueError(f"{len(prompts)} prompts but {len(outputs)} output lengths")
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].astype(">i4").tobytes())
    segments: list[Segment] = []
    stack: list[tuple[int, int]] = []  # open segments, deepest last
    depth = 0  # tokens of the row before, all of which the stack covers
    for row, following in zip(order, [*order[1:], None], strict=True):
        if len(prompts[row]) > depth:
            stack.append((depth, 0))
            depth = len(prompts[row])
        start, steps = stack.pop()
        stack.append((start, max(steps, outputs[row] - 1)))
        common = 0 if following is None else _common_prefix(prompts[row], prompts[following])
        while depth > common:
            start, steps = stack.pop()
            cut = max(start, common)
            segments.append(Segment(cut, depth, steps))
            if cut > start:
                stack.append((start, steps))
            elif stack:
                stack[-1] = (stack[-1][0], max(stack[-1][1], steps))
            depth = cut
    return segments


def measure(prompts: Sequence[TokenIds], outputs: Sequence[int]) -> Workload:
    """Counts what the prompts (int32 [num_tokens] each) and output lengths (≥ 1) must cost.

    KV tokens read = Σ over tree tokens of the decode steps of the longest row below them, plus,
    for the outputs, step j of a row reading the j - 1 output tokens it had cached before.
    """
    if not prompts or min(outputs) < 1 or min(map(len, prompts)) < 1:
        raise ValueError("a workload needs rows, and each row a prompt and an output token")
    segments = prefix_segments(prompts, outputs)
    steps = [length - 1 for length in outputs]
    return Workload(
        tree_tokens=sum(s.length for s in segments),
        decode_tokens=sum(steps),
        output_tokens=sum(outputs),
        longest_output=max(outputs),
        attended_positions=sum(_sum_to(s.end) - _sum_to(s.start) for s in segments),
        kv_tokens_read=sum(s.length * s.decode_steps for s in segments)
        + sum(_sum_to(n - 1) for n in steps),
    )


def least_steps(work: Workload, kv_capacity: int | None) -> int:
    """Steps ≥ the longest output (a row samples once a step), and ≥ what KV memory allows.

    What decode steps read must be in memory then, so `kv_capacity` tokens of it a step at most.
    """
    if kv_capacity is None:
        return work.longest_output
    return max(work.longest_output, math.ceil(work.kv_tokens_read / kv_capacity))


def bound(model: ModelShape, work: Workload, rates: Rates, kv_capacity: int | None = None) -> Bound:
    """T_opt and its parts, in seconds; `kv_capacity` is the KV memory in tokens, None for ample.

    T_gemm = 2 · P_body · (N_pf + N_dec) / F + 2 · vocab · hidden · Σ outputs / F
    T_attn = 4 · layers · q_heads · head_dim · Σ over tree tokens of their position / F
    """
    body = 2 * model.body_parameters * (work.tree_tokens + work.decode_tokens)
    head = 2 * model.head_parameters * work.output_tokens
    attention = 4 * model.layers * model.q_heads * model.head_dim * work.attended_positions
    steps = least_steps(work, kv_capacity)
    return Bound(
        gemm=(body + head) / rates.flops,
        attention=attention / rates.flops,
        kv_read=model.kv_bytes_per_token * work.kv_tokens_read / rates.bandwidth,
        weight_read=steps * model.weight_bytes / rates.bandwidth,
        steps=steps,
    )


def _common_prefix(a: TokenIds, b: TokenIds) -> int:
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


def _sum_to(n: int) -> int:
    """1 + 2 + … + n."""
    return n * (n + 1) // 2
