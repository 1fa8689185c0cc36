"""Tokens from one step to the next without the host's seeing them."""

import numpy as np
import torch
from numpy.typing import NDArray

from batchllm.scheduler.batch import Batch

Ints = NDArray[np.int64]


class TokenFeed:
    """What the last step sampled, where the next one finds it.

    A batch may be made before the tokens it goes on from are known (`Batch.carried`): their places
    hold 0, and what was sampled is added on the device. Where a token comes from is one number
    for each, so that a recorded step can do the same; those that come from nowhere add the 0 at the
    end. A sample that failed feeds 0: an embedding must be found, and nobody reads the answer.
    """

    def __init__(self, max_num_samples: int, device: torch.device) -> None:
        self._nowhere = max_num_samples
        self._sampled = torch.zeros(max_num_samples + 1, dtype=torch.int32, device=device)

    def sources(self, batch: Batch) -> Ints:
        """Where each of a batch's tokens comes from, int64 [num_tokens]."""
        sources = np.full(len(batch.token_ids), self._nowhere, dtype=np.int64)
        sources[batch.carried.token] = batch.carried.sample
        return sources

    def add(self, token_ids: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """The tokens themselves, int32 [num_tokens], from those that the host knows and the rest.

        Args:
            token_ids: int32 [num_tokens], 0 where the host does not know.
            sources: int64 [num_tokens], see `sources`.
        """
        return token_ids + self._sampled[sources]

    def keep(self, tokens: torch.Tensor) -> None:
        """Feed the next step with what this one sampled, int32 [num_samples]."""
        torch.clamp(tokens, min=0, out=self._sampled[: len(tokens)])
