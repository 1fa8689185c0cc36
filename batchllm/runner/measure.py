"""The machine's own rates for a model's matrix products and its memory.

Measured is torch's default device; `settle` waits until it has done what it was given.
"""

import time
from collections.abc import Callable

import torch

from batchllm.models.linear import Linear, Pack, Product, StripsProduct
from batchllm.native.kernels import whole_strips
from batchllm.simulate.shape import ModelShape

Settle = Callable[[], None]

_ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048)
_SECONDS = 0.15  # for one measurement
_READ_BYTES = 1 << 29  # far more than caches hold


@torch.inference_mode()
def gemm_rates(
    shape: ModelShape, dtype: str, pack: Pack, settle: Settle
) -> tuple[tuple[int, float], ...]:
    """FLOP/s of the body's products by rows, as `Machine.gemm_rates` has them.

    The weights of several layers are taken in turn, so that, as in a step, they come from memory,
    and rows lie as a step's do.
    """
    kind = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    heads = shape.num_heads * shape.head_dim
    sizes = (
        (shape.hidden_size, heads + 2 * shape.num_kv_heads * shape.head_dim),
        (heads, shape.hidden_size),
        (shape.hidden_size, 2 * shape.intermediate_size),
        (shape.intermediate_size, shape.hidden_size),
    )
    layers = [
        [_random_linear(inputs, outputs, kind, pack) for inputs, outputs in sizes]
        for _ in range(min(shape.num_layers, 8))
    ]
    flops = 2 * sum(inputs * outputs for inputs, outputs in sizes) * len(layers)
    rates = []
    for rows in _ROWS:
        given = {inputs: torch.randn(whole_strips(rows), inputs).to(kind) for inputs, _ in sizes}

        def run(rows: int = rows, given: dict[int, torch.Tensor] = given) -> None:
            for weights in layers:
                for (inputs, _), linear in zip(sizes, weights, strict=True):
                    multiply(linear.product, given[inputs], rows)

        rates.append((rows, rows * flops / _least_seconds(run, settle)))
    return tuple(rates)


def multiply(product: Product, x: torch.Tensor, rows: int) -> torch.Tensor:
    """The first `rows` of x [whole strips, inputs], in strips if the product can take them so."""
    out = product.in_strips(x, rows) if isinstance(product, StripsProduct) else None
    return product(x[:rows]) if out is None else out


def _random_linear(inputs: int, outputs: int, dtype: torch.dtype, pack: Pack) -> Linear:
    linear = Linear(inputs, outputs, dtype=dtype)
    assert linear.weight is not None
    linear.weight.copy_(torch.randn(outputs, inputs))
    linear.pack(pack)
    return linear


@torch.inference_mode()
def read_bandwidth(settle: Settle) -> float:
    """Bytes/s of reading memory."""
    values = torch.ones(_READ_BYTES // 4)
    return _READ_BYTES / _least_seconds(lambda: values.sum(), settle)


def _least_seconds(call: Callable[[], object], settle: Settle) -> float:
    """The least time of a call: anything else that runs can only slow one down."""
    call()
    settle()
    least, tries, until = float("inf"), 0, time.perf_counter() + _SECONDS
    while tries < 3 or time.perf_counter() < until:
        started = time.perf_counter()
        call()
        settle()
        least = min(least, time.perf_counter() - started)
        tries += 1
    return least
