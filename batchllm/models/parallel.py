"""One of several equal processes' shares of a model: tensor parallelism, as Megatron-LM cut it.

Attention is cut by heads and the feed-forward layer by its inner channels (arXiv 1909.08053, §3):
query-key-value and gate-up by outputs, so that each process has whole heads and channels, what
comes after them by inputs, so that each has a part of the sum and one all-reduce makes it whole.
Two all-reduces a layer, then; the head is cut by the vocabulary and its logits are gathered. Norms
and the embedding are whole in every process: a lookup that had to be summed up would cost another
all-reduce in each step, to save memory that is a few per cent of a large model's.

Everybody ends up with the same hidden states and logits, so everybody samples the same tokens.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from batchllm.errors import UsageError
from batchllm.models.config import ModelConfig
from batchllm.models.layout import Part, Shape

if TYPE_CHECKING:
    import torch

_BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
_BY_INPUTS = ("o_proj", "down_proj")


class Group(Protocol):
    """The processes that share a model, as each of them sees it. All must call the same in turn."""

    def sum(self, x: "torch.Tensor") -> "torch.Tensor":
        """Everybody's `x` added up, in place: everybody gets the same bits."""
        ...

    def gather(self, x: "torch.Tensor") -> "torch.Tensor":
        """Everybody's `x`, [size, *x.shape], by rank."""
        ...

    def least(self, count: int) -> int:
        """The least of everybody's counts."""
        ...


@dataclass(frozen=True, slots=True)
class Shard:
    """Share `rank` of `size`; without a `group` it is the whole, and communicates with nobody."""

    rank: int = 0
    size: int = 1
    group: Group | None = None

    def bounds(self, count: int) -> tuple[int, int]:
        """Of `count` heads, channels or words, those from the first on and below the second."""
        return _bounds(count, self.rank, self.size)

    def config(self, config: ModelConfig) -> ModelConfig:
        """The sizes of this share; the vocabulary stays whole, since tokens are looked up in it.

        Raises:
            UsageError: the heads cannot be divided.
        """
        if self.size == 1:
            return config
        check_divides(config, self.size)
        begin, end = self.bounds(config.intermediate_size)
        return replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=config.num_kv_heads // self.size,
            intermediate_size=end - begin,
        )

    def part(self, name: str, shape: Shape) -> Part | None:
        """Which part of a checkpoint's tensor belongs to this share (see `Cut`)."""
        layer, kind = name.split(".")[-2:]
        if layer in _BY_OUTPUTS:
            return (slice(*self.bounds(shape[0])),)
        if layer not in _BY_INPUTS:
            return ()
        if kind == "bias":  # of a sum: one has it
            return () if self.rank == 0 else None
        return slice(None), slice(*self.bounds(shape[1]))

    def sum(self, x: "torch.Tensor") -> "torch.Tensor":
        """A product that was cut by inputs, made whole; may be in place."""
        return x if self.group is None else self.group.sum(x)

    def least(self, count: int) -> int:
        """The least of everybody's counts; who asks waits for the others."""
        return count if self.group is None else self.group.least(count)

    def gather(self, logits: "torch.Tensor", vocab_size: int) -> "torch.Tensor":
        """All logits [n, vocab_size] of this share's, [n, words of its own]."""
        if self.group is None:
            return logits
        widest = -(-vocab_size // self.size)
        blocks = self.group.gather(_padded(logits, widest))
        each = [_bounds(vocab_size, rank, self.size) for rank in range(self.size)]
        widths = [end - begin for begin, end in each]
        whole = logits.new_empty(len(logits), vocab_size)
        for block, (begin, end), width in zip(blocks, each, widths, strict=True):
            whole[:, begin:end] = block[:, :width]
        return whole


WHOLE = Shard()


def check_divides(config: ModelConfig, size: int) -> None:
    """Refuse to cut a model where a head would be cut.

    Raises:
        UsageError: it names the sizes that are possible.
    """
    heads = config.num_kv_heads
    if heads % size:
        possible = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UsageError(
            f"tensor_parallel_size is {size}, but the model's {heads} key-value heads can only be "
            f"divided among {possible}"
        )


def _bounds(count: int, rank: int, size: int) -> tuple[int, int]:
    return count * rank // size, count * (rank + 1) // size


def _padded(x: "torch.Tensor", width: int) -> "torch.Tensor":
    """[n, width], whatever stands behind the values of `x`."""
    if x.shape[1] == width:
        return x
    wide = x.new_zeros(len(x), width)
    wide[:, : x.shape[1]] = x
    return wide
