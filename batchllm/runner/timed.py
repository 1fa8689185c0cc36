"""Where a step's time goes: the runner's parts, each with a clock around its calls."""

from collections.abc import Sequence

import torch

from batchllm.attention.backend import AttentionBackend, LayerPlan
from batchllm.models.linear import Product
from batchllm.models.operations import LayerParts, Operations
from batchllm.models.rope import Rotation
from batchllm.runner.clock import ATTENTION, PRODUCTS, ROW_WISE, SAMPLING, Clock
from batchllm.runner.model_input import ModelInput
from batchllm.runner.staging import Put


class TimedOperations:
    """`Operations`, timed."""

    def __init__(self, operations: Operations, clock: Clock) -> None:
        self._operations = operations
        self._clock = clock
        self.add_rms_norm = clock.timed(ROW_WISE, operations.add_rms_norm)
        self.silu_and_multiply = clock.timed(ROW_WISE, operations.silu_and_multiply)
        self.argmax = clock.timed(SAMPLING, operations.argmax)

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return self._clock.timed(PRODUCTS, self._operations.pack(weight, bias))

    def pack_int8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return self._clock.timed(PRODUCTS, self._operations.pack_int8(weight, bias))

    def pack_float8(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        """See `Operations`."""
        return self._clock.timed(PRODUCTS, self._operations.pack_float8(weight, bias))

    def pack_gated(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantization: str | None
    ) -> Product | None:
        """See `Operations`."""
        product = self._operations.pack_gated(weight, bias, quantization)
        return None if product is None else self._clock.timed(PRODUCTS, product)

    def pack_blocks(self, layers: Sequence[LayerParts], eps: float) -> None:
        """None: in one call, parts cannot be timed."""


class TimedBackend:
    """`AttentionBackend`, timed."""

    def __init__(self, backend: AttentionBackend, clock: Clock) -> None:
        self.name = backend.name
        self.granularity = backend.granularity
        self._clock = clock
        self._plan = clock.timed(ATTENTION, backend.plan)

    def plan(self, step: ModelInput, rotation: Rotation, put: Put = torch.from_numpy) -> LayerPlan:
        """See `AttentionBackend`."""
        return _TimedPlan(self._plan(step, rotation, put), self._clock)


class _TimedPlan:
    def __init__(self, plan: LayerPlan, clock: Clock) -> None:
        self.run = clock.timed(ATTENTION, plan.run)
