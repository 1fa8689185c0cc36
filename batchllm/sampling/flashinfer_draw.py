"""Filtered draws by FlashInfer's kernels, for logits on a GPU."""

import inspect
from typing import Any

import torch

from batchllm.flashinfer_library import load_flashinfer
from batchllm.sampling.sampler import Draws, invert


class FlashInferDraw:
    """A `Draw` (sampling/sampler.py) that sorts nothing and lets the host wait for nothing.

    FlashInfer's own samplers draw from a generator whose state depends on what was drawn before;
    here its kernels only find which tokens may be drawn. Unlike a sort they keep all that are as
    likely as the last one kept, and the numbers a row is drawn by meet its tokens in the order of
    the vocabulary: a row's draws are always the same, but not those of `draw_sorted`.

    Raises:
        UsageError: FlashInfer cannot run here.
    """

    def __init__(self, library: Any = None) -> None:  # noqa: ANN401
        self._library = load_flashinfer() if library is None else library
        parameters = inspect.signature(self._library.top_p_renorm_probs).parameters
        # Later versions add up in any order unless told otherwise; before there was no other way.
        self._exactly = {"is_deterministic": True} if "is_deterministic" in parameters else {}

    def __call__(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        """See `Draw`."""
        # The kernels search for thresholds; nobody promises that they end where there are NaNs.
        weights = torch.softmax(logits, dim=-1).nan_to_num_(nan=1 / logits.shape[-1])
        if draws.top_k is not None:
            weights = self._library.top_k_renorm_probs(weights, draws.top_k)
        if draws.top_p is not None:
            weights = self._library.top_p_renorm_probs(weights, draws.top_p, **self._exactly)
        return invert(weights, draws.numbers)
