"""What a row asks and what it gets back: the plain data every other part hands around."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from batchllm.errors import UsageError

TokenIds = NDArray[np.int32]
FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one row's answer is sampled.

    `temperature=0` is greedy. `top_k=0` and `top_p=1` switch those filters off. A row draws its
    random numbers from (`seed`, row index, output position) alone, so its answer does not depend
    on what else is in the batch.

    Raises:
        UsageError: a value is out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0.0 <= self.temperature <= 100.0:
            raise UsageError(f"temperature is {self.temperature}; it must be in [0, 100]")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top_p is {self.top_p}; it must be in (0, 1]")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}; it must be 0 (off) or more")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one row has no answer: a short stable code and a sentence."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass(frozen=True, slots=True)
class Request:
    """What one row asks: its prompt as token ids (int32, [num_tokens]) and how to sample.

    `row_index` is the row's number in the whole input, so that seeds survive any windowing.
    """

    row_index: int
    prompt_token_ids: TokenIds
    sampling_params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """One row's answer, or its error. Counts are in tokens.

    `cached_tokens` are the prompt tokens whose KV another row had already computed.
    `output_token_ids` include the end-of-sequence token where one was sampled; `text` does not.
    """

    row_index: int
    text: str | None
    output_token_ids: TokenIds
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    error: RowError | None = None

    @property
    def output_tokens(self) -> int:
        return len(self.output_token_ids)


@dataclass(frozen=True, slots=True)
class RaggedTokens:
    """Many token sequences in two arrays.

    `values` is int32 [num_tokens]; `offsets` is int64 [num_sequences + 1], starting at 0.
    Sequence i is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: TokenIds
    offsets: NDArray[np.int64]

    @classmethod
    def from_sequences(cls, sequences: Sequence[Sequence[int] | TokenIds]) -> "RaggedTokens":
        offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum([len(s) for s in sequences], out=offsets[1:])
        if len(sequences) == 0:
            return cls(np.zeros(0, dtype=np.int32), offsets)
        values = np.concatenate([np.asarray(s, dtype=np.int32) for s in sequences])
        return cls(values, offsets)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> TokenIds:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[TokenIds]:
        return (self[i] for i in range(len(self)))
