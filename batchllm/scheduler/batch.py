"""What crosses between scheduler and runner: plain arrays."""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from batchllm.request import FinishReason, SamplingParams, TokenIds

Ints = NDArray[np.int64]
NO_TOKEN = -1  # in a sampled token's place; so `Operations.argmax` gives it too
Ending = Literal["stop", "length", "kv_memory", "nan_logits"]
_NONE: Ints = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Chunks:
    """Runs of consecutive tokens, each of one KV segment, computed in one step; all [num_chunks].

    Chunk i has `count[i]` tokens, the first of them at position `start[i]` of its prompt. They go
    into the blocks `Batch.tables[i]` from place `offset[i]` on (in tokens), and attend, causally,
    to what these hold and to themselves.
    """

    count: Ints
    start: Ints
    offset: Ints

    def __len__(self) -> int:
        return len(self.count)


@dataclass(frozen=True, slots=True)
class SharedReads:
    """Shared segments that chunks attend to as a whole; all [num_shared].

    All tokens of the chunks `[chunk_begin[i], chunk_end[i])` attend to the `length[i]` tokens, at
    positions `start[i]` and on, that are in the blocks `Batch.tables[num_chunks + i]`.
    """

    chunk_begin: Ints
    chunk_end: Ints
    start: Ints
    length: Ints

    def __len__(self) -> int:
        return len(self.length)


@dataclass(frozen=True, slots=True)
class Samples:
    """The tokens to sample after a step; all [num_samples] but `params`.

    The last token of chunk `chunk[i]` gives output `output_position[i]` (0 for the first) of the
    row `row_index[i]`, sampled by `params[params_index[i]]`. `leaf[i]` is who it is for in the
    plan, and `sequence[i]` in the scheduler's own numbers.
    """

    chunk: Ints
    sequence: Ints
    leaf: Ints
    row_index: Ints
    output_position: Ints
    params_index: Ints
    params: list[SamplingParams]

    def __len__(self) -> int:
        return len(self.chunk)

    def part(self, begin: int, end: int) -> "Samples":
        """Samples `[begin, end)`."""
        return self._at(slice(begin, end))

    def take(self, which: Ints) -> "Samples":
        """Those at these places."""
        return self._at(which)

    def _at(self, which: slice | Ints) -> "Samples":
        each = {f.name: getattr(self, f.name)[which] for f in fields(self)[:-1]}
        return Samples(**each, params=self.params)


@dataclass(frozen=True, slots=True)
class Carried:
    """Tokens of a batch that the one before it samples; both [num_carried].

    `Batch.token_ids[token[i]]` is what was sampled for `sample[i]` of the batch before it, whose
    value the scheduler does not know yet (the place holds 0). Where that is `NO_TOKEN`, the 0 may
    stay: nobody will read what is computed from it.
    """

    token: Ints
    sample: Ints

    def __len__(self) -> int:
        return len(self.token)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: chunks in depth-first order, so a shared segment's readers are contiguous.

    `token_ids` int32 [num_tokens] are the chunks' tokens one behind the other; `tables` int32
    [num_chunks + num_shared, widest] the blocks of chunks and shared segments. With `num_steps`
    above 1 the batch is that many steps of one decode each, of which this is the first. One that is
    only simulated has no `token_ids` and no `tables`. `carried` tokens exist only where the batch
    was made before the result of the one before it was known.
    """

    token_ids: TokenIds
    chunks: Chunks
    shared: SharedReads
    tables: NDArray[np.int32]
    samples: Samples
    num_decodes: int
    num_steps: int = 1
    carried: Carried = Carried(_NONE, _NONE)

    @property
    def num_tokens(self) -> int:
        """Tokens of one step."""
        return int(self.chunks.count.sum())

    @property
    def is_decode_only(self) -> bool:
        """Whether it is one token of each sequence, and samples after every one of them.

        A prompt's last token, computed by itself, is the same to the model.
        """
        num_chunks = len(self.chunks)
        return (
            0 < num_chunks == len(self.samples)
            and bool((self.chunks.count == 1).all())
            and np.array_equal(self.samples.chunk, np.arange(num_chunks))
        )


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The sampled token of every sample of the batch's last step, int32 [num_samples].

    `NO_TOKEN` where none could be sampled, because the logits were not numbers to sample by.
    """

    token_ids: TokenIds

    @property
    def failed(self) -> NDArray[np.bool_]:
        """Which samples have no token, [num_samples]."""
        missing: NDArray[np.bool_] = self.token_ids == NO_TOKEN
        return missing

    def ends(self, eos_token_ids: frozenset[int]) -> NDArray[np.bool_]:
        """Which tokens end an answer; of those there are few, so one comparison each is least."""
        ends = np.zeros(len(self.token_ids), dtype=np.bool_)
        for token in eos_token_ids:
            ends |= self.token_ids == token
        return ends


@dataclass(frozen=True, slots=True)
class FinishedSequence:
    """A leaf that is answered or failed, for one row or for duplicates.

    `ending` is how; `kv_memory` and `nan_logits` are errors. `num_fresh_prompt_tokens` of its
    prompt were computed for it; the rest had been for others.
    """

    leaf: int
    output_token_ids: TokenIds
    ending: Ending
    num_fresh_prompt_tokens: int

    @property
    def finish_reason(self) -> FinishReason:
        """The ending as rows report it."""
        match self.ending:
            case "stop" | "length" as reason:
                return reason
            case _:
                return "error"


def endings(stopped: NDArray[np.bool_], failed: NDArray[np.bool_]) -> list[Ending]:
    """How each ended that a step ended; who neither stopped nor failed is as long as it may be."""
    return [
        "nan_logits" if has_failed else "stop" if has_stopped else "length"
        for has_stopped, has_failed in zip(stopped.tolist(), failed.tolist(), strict=True)
    ]
