"""A window's prompts, for reports: no requests, no model."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchllm.prefix.plan import PrefixPlan, plan_tokens
from batchllm.request import RaggedTokens, SamplingParams


@dataclass(frozen=True, slots=True)
class Prompts:
    """A window's prompts, none empty, and how long each one's answer is, [num_rows]."""

    tokens: RaggedTokens
    output_tokens: NDArray[np.int64]

    def plan(self, policy: str) -> PrefixPlan:
        """The window planned by a policy that knows how long the answers are."""
        lengths, index = np.unique(self.output_tokens, return_inverse=True)
        params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths.tolist()]
        return plan_tokens(self.tokens, params, index, policy=policy)
