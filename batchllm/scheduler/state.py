"""The run state of tree nodes and sequences. The scheduler alone changes it."""

from dataclasses import dataclass, field

from batchllm.request import FinishReason, SamplingParams, TokenIds


@dataclass(slots=True, eq=False)
class Segment:
    """The KV of a run of consecutive tokens with one owner.

    `start` is the position of its first token in the prompt. `num_computed_tokens` tokens from
    there have their KV in `block_ids`, or will have once the step that was last scheduled has run.
    `high_water` is the most that ever had: computing below it is repetition.
    """

    start: int
    block_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    high_water: int = 0


@dataclass(slots=True, eq=False)
class Node:
    """A shared node of the prefix tree, computed once, by the first sequence that needs it.

    `path` is the chain of nodes from the top down to this one. `num_unfinished` counts the
    sequences below it that still need it and `num_running` those of them that are admitted.
    """

    order: int
    token_ids: TokenIds
    segment: Segment
    path: "tuple[Node, ...]" = ()
    num_unfinished: int = 0
    num_running: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def complete(self) -> bool:
        return self.segment.num_computed_tokens == len(self.token_ids)


@dataclass(slots=True, eq=False)
class Sequence:
    """The run state of one leaf: a distinct prompt being answered, for one row or for duplicates.

    `path` are the shared nodes above it. Its private part is the prompt's own tail (at least one
    token), followed by the output so far; `segment` is that part's KV. Preemption drops the private
    KV and nothing else, so no token is ever sampled twice.
    """

    leaf: int
    order: int
    row_index: int
    path: tuple[Node, ...]
    segment: Segment
    tail_token_ids: TokenIds
    max_tokens: int
    sampling_params: SamplingParams
    output_token_ids: list[int] = field(default_factory=list)
    num_fresh_prompt_tokens: int = 0
    finish_reason: FinishReason | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return self.segment.start + len(self.tail_token_ids)

    @property
    def num_private_tokens(self) -> int:
        return len(self.tail_token_ids) + len(self.output_token_ids)

    @property
    def num_pending_tokens(self) -> int:
        """Private tokens whose KV is still to be computed."""
        return self.num_private_tokens - self.segment.num_computed_tokens

    @property
    def decoding(self) -> bool:
        """All that is missing is the KV of the token sampled last."""
        return bool(self.output_token_ids) and self.num_pending_tokens == 1

    def private_tokens(self, begin: int, end: int) -> TokenIds | list[int]:
        """Tokens `[begin, end)` of the private part."""
        tail = len(self.tail_token_ids)
        if begin >= tail:
            return self.output_token_ids[begin - tail : end - tail]
        if end <= tail:
            return self.tail_token_ids[begin:end]
        return [*self.tail_token_ids[begin:].tolist(), *self.output_token_ids[: end - tail]]


@dataclass(frozen=True, slots=True)
class Sample:
    """A token to sample: whose, how, and which output position it is (0 for the first)."""

    leaf: int
    row_index: int
    output_position: int
    sampling_params: SamplingParams


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one node or sequence, computed in one step.

    The tokens go into `block_ids` from `offset` on (in tokens) and attend to all of `path` (nodes
    outermost first, each with its tokens and blocks) and to what `block_ids` already holds.
    """

    order: int
    token_ids: TokenIds | list[int]
    start: int
    offset: int
    block_ids: list[int]
    path: tuple[Node, ...]
    sample: Sample | None


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: chunks in depth-first order, so a node's members are contiguous."""

    chunks: list[Chunk]
    num_tokens: int
    num_decodes: int


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The sampled token of every chunk that samples, in the batch's order, [num_samples]."""

    token_ids: list[int]
