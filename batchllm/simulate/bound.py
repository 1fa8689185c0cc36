"""The least time a machine could need for a plan: T_opt."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.tree import PrefixTree
from batchllm.simulate.machine import Machine
from batchllm.simulate.shape import ModelShape

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """T_opt in seconds, and what it is made of.

    Every distinct prompt token and every decoded token goes through the body once, every sampled
    one through the head; every decode reads the KV before it, shared KV once for all rows that
    decode side by side; every step reads the weights.
    """

    gemm: float
    attention: float
    kv_read: float
    weight_read: float

    @property
    def overlap(self) -> float:
        """T_opt = max(T_gemm + T_attn, (KV bytes + weight bytes) / B): nothing can be faster."""
        return max(self.gemm + self.attention, self.kv_read + self.weight_read)

    @property
    def total(self) -> float:
        """The sum of both sides: nothing that does one thing at a time can be faster."""
        return self.gemm + self.attention + self.kv_read + self.weight_read


def bound(
    tree: PrefixTree, outputs: Ints, machine: Machine, shape: ModelShape, kv_tokens: int
) -> Bound:
    """The bound of answering `tree`'s leaves, leaf i with `outputs[i]` >= 1 tokens.

    `kv_tokens` is the KV memory: what decodes read has to be in it, so a step reads no more.
    Attention is charged at the products' rate, which no kernel exceeds.
    """
    rate = machine.best_gemm_rate
    steps = outputs - 1
    body = 2 * shape.body_parameters * (tree.num_distinct_prefixes + int(steps.sum()))
    head = 2 * shape.head_parameters * int(outputs.sum())
    read = _kv_tokens_read(tree, steps)
    num_steps = max(int(outputs.max(initial=0)), math.ceil(read / kv_tokens))
    return Bound(
        gemm=(body + head) / rate,
        attention=shape.attention_flops * _attended_positions(tree) / rate,
        kv_read=shape.kv_bytes_per_token * read / machine.bandwidth,
        weight_read=num_steps * shape.weight_bytes / machine.bandwidth,
    )


def _attended_positions(tree: PrefixTree) -> int:
    """Sum over the distinct prompt tokens of how many keys each attends to, itself included."""
    total = int(
        (_sum_to(tree.node_end) - _sum_to(tree.node_start)).sum()
        + (_sum_to(tree.leaf_length) - _sum_to(tree.leaf_start)).sum()
    )
    # Repeated last tokens are not distinct; which they are is not kept, so take off the most.
    return max(total - tree.num_repeated_tokens * int(tree.leaf_length.max(initial=0)), 0)


def _kv_tokens_read(tree: PrefixTree, steps: Ints) -> int:
    """KV tokens that `steps` [num_leaves] decodes must read, shared ones once for all members.

    A node is read for as long as the longest of its leaves decodes.
    """
    shared = 0
    if tree.num_nodes:
        pairs = np.stack([tree.node_leaf_begin, tree.node_leaf_end], axis=1).ravel()
        longest = np.maximum.reduceat(np.append(steps, 0), pairs)[::2]
        shared = int(((tree.node_end - tree.node_start) * longest).sum())
    own = (tree.leaf_length - tree.leaf_start) * steps
    repeated = tree.num_repeated_tokens * int(steps.max(initial=0))  # at most, as above
    return max(shared + int((own + _sum_to(steps - 1)).sum()) - repeated, 0)


def _sum_to(n: Ints) -> Ints:
    """1 + 2 + … + n."""
    return n * (n + 1) // 2
