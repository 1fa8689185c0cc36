"""Measures the machine's two rates for the bound: F, bf16 matrix products, and B, memory.

And, to know what int8 could gain, the rate of int8 products; the bound does not use it.

F is taken over the model's own matrices, each by the fastest way there is: torch's two (plain, and
with the weight repacked for oneDNN once) and batchllm's, at each number of rows given; the best
counts, with or without the head, so that the bound flatters nobody. B is the better of reading and
copying far more than caches hold. The minimum over repeats is used: anything else that runs can
only slow a repeat down.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from bound import ModelShape

from batchllm.models.linear import pack_torch, pack_torch_int8
from batchllm.models.native_linear import NativeProducts
from batchllm.native.kernels import load_kernels, only_torch_has_tiles, whole_strips
from batchllm.runner.measure import multiply

READ_BYTES = 1 << 29
SECONDS_A_MEASUREMENT = 0.3
HOPELESS_SECONDS = 1.0  # torch's bfloat16 on a processor that has none takes many


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRates:
    """F in FLOP/s and B in bytes/s, as bound.Rates takes them, and what they were chosen from.

    `int8_flops` is the best rate of the body's products in int8, rounding their rows included.
    """

    flops: float
    int8_flops: float
    bandwidth: float
    pass_flops_by_rows: dict[int, float]
    body_flops_by_rows: dict[int, float]
    head_flops_by_rows: dict[int, float]
    read: float
    copy: float
    threads: int


def best_seconds(call: Callable[[], object]) -> float:
    """The least time one call took: of the first, if that is hopeless, else of three or more."""
    best = float("inf")
    repeats = 0
    until = time.perf_counter() + SECONDS_A_MEASUREMENT
    while (repeats < 4 and best < HOPELESS_SECONDS) or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
        repeats += 1
    return best


def linear_seconds(rows: int, inputs: int, outputs: int) -> float:
    """Seconds of x @ w.T in bf16, x [rows, inputs], w [outputs, inputs], the fastest way."""
    x = torch.randn(whole_strips(rows), inputs).to(torch.bfloat16)
    w = torch.randn(outputs, inputs).to(torch.bfloat16)
    kernels = load_kernels()
    ways = [lambda x: F.linear(x, w), pack_torch(w, None)]
    if kernels is not None:
        ways.append(NativeProducts(kernels, tiles=only_torch_has_tiles()).pack(w, None))
    return min(best_seconds(lambda way=way: multiply(way, x, rows)) for way in ways)


def int8_seconds(rows: int, inputs: int, outputs: int) -> float:
    """Seconds of the same product by an int8 weight, x rounded on the way."""
    x = torch.randn(whole_strips(rows), inputs).to(torch.bfloat16)
    w = torch.randn(outputs, inputs).to(torch.bfloat16)
    kernels = load_kernels()
    if kernels is None:
        product = pack_torch_int8(w, None)
    else:
        product = NativeProducts(kernels, tiles=only_torch_has_tiles()).pack_int8(w, None)
    return best_seconds(lambda: multiply(product, x, rows))


@torch.inference_mode()
def measure(model: ModelShape, row_counts: list[int]) -> MeasuredRates:
    """Times all five products at each number of rows, then memory.

    A whole pass is what the model does for a sampled token: all layers' four products, and the
    head once; the body is the pass without the head.
    """
    whole, body, head = {}, {}, {}
    int8 = 0.0
    for rows in row_counts:
        seconds = {name: linear_seconds(rows, a, b) for name, (a, b) in model.matrices.items()}
        head_seconds = seconds.pop("head")
        body_seconds = model.layers * sum(seconds.values())
        body_flop = 2 * rows * model.body_parameters
        head_flop = 2 * rows * model.head_parameters
        whole[rows] = (body_flop + head_flop) / (body_seconds + head_seconds)
        body[rows] = body_flop / body_seconds
        head[rows] = head_flop / head_seconds
        layer = [pair for name, pair in model.matrices.items() if name != "head"]
        int8_body_seconds = model.layers * sum(int8_seconds(rows, a, b) for a, b in layer)
        int8 = max(int8, body_flop / int8_body_seconds)
    source = torch.ones(READ_BYTES // 4)
    target = torch.empty_like(source)
    read = READ_BYTES / best_seconds(source.sum)
    copy = 2 * READ_BYTES / best_seconds(lambda: target.copy_(source))
    return MeasuredRates(
        flops=max(*whole.values(), *body.values()),
        int8_flops=int8,
        bandwidth=max(read, copy),
        pass_flops_by_rows=whole,
        body_flops_by_rows=body,
        head_flops_by_rows=head,
        read=read,
        copy=copy,
        threads=torch.get_num_threads(),
    )


def main() -> None:
    """Command line: the model's sizes, and the numbers of rows to multiply."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sizes", type=json.loads, help="of a bound.ModelShape, as JSON")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024, 2048])
    arguments = parser.parse_args()
    print(json.dumps(asdict(measure(ModelShape(**arguments.sizes), arguments.rows))))


if __name__ == "__main__":
    main()
