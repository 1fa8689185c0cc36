"""What a machine can do."""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

from batchllm.errors import UsageError
from batchllm.simulate.shape import ModelShape

_KV_SHARE = 0.9  # of the memory that the weights leave; the rest is activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Rates that the cost model goes by; reached in practice, not on the datasheet.

    `gemm_rates` are FLOP/s of the model's matrix products by tokens in the step, as (tokens,
    rate), ascending; between them the rate is interpolated over the logarithm of the tokens, and
    outside it is the nearest one's. `attention_rate` is FLOP/s of attention over long segments,
    `bandwidth` bytes/s of memory, `step_seconds` what a step costs whatever is in it, and
    `token_seconds` what a token costs beyond its products, `sample_seconds` a
    sampled one more. `memory` is in bytes. Decodes read KV at `kv_bandwidth` (None: as weights are
    read); every shared segment and prefill chunk costs `segment_seconds` more.
    `one_attention_launch`: all of a step's attention runs at once, so that what is bound by
    arithmetic hides what is bound by reading; otherwise segments run one behind the other.
    `overlap_share`: where half a step's attention runs beside the other half's products, it has
    this share of the chip, and the products the rest; with it, it computes so much slower, but
    reads at `overlap_speed` of its bandwidth. 0 where nothing runs side by side.
    `max_num_batched_tokens` is the step's budget that suits it; the `streaming_…` limits are vLLM
    0.32's own defaults for offline use there.
    """

    name: str
    gemm_rates: tuple[tuple[int, float], ...]
    attention_rate: float
    bandwidth: float
    memory: int
    step_seconds: float
    token_seconds: float = 0.0
    sample_seconds: float = 0.0
    kv_bandwidth: float | None = None
    segment_seconds: float = 0.0
    one_attention_launch: bool = False
    overlap_share: float = 0.0
    overlap_speed: float = 0.0
    max_num_batched_tokens: int = 2048
    streaming_batched_tokens: int = 8192
    streaming_num_seqs: int = 256

    @property
    def best_gemm_rate(self) -> float:
        """FLOP/s of large products: what the bound goes by."""
        return max(rate for _, rate in self.gemm_rates)

    def gemm_rate(self, num_tokens: float) -> float:
        """FLOP/s of a product over `num_tokens` rows."""
        table = self.gemm_rates
        place = bisect_right(table, num_tokens, key=lambda entry: entry[0])
        if place == 0 or place == len(table):
            return table[max(place - 1, 0)][1]
        (low, slow), (high, fast) = table[place - 1], table[place]
        return slow + (fast - slow) * math.log(num_tokens / low) / math.log(high / low)

    def at_best(self, gemm_rates: tuple[tuple[int, float], ...], bandwidth: float) -> "Machine":
        """With the better of the rates it has and of these, for the same numbers of tokens."""
        had = dict(self.gemm_rates)
        best = tuple((tokens, max(rate, had.get(tokens, 0.0))) for tokens, rate in gemm_rates)
        return replace(self, gemm_rates=best, bandwidth=max(bandwidth, self.bandwidth))

    def with_overlap(self, share_and_speed: tuple[float, float] | None) -> "Machine":
        """The same where attention has such a share and speed beside products, or never runs so."""
        share, speed = share_and_speed or (0.0, 0.0)
        return replace(self, overlap_share=share, overlap_speed=speed)

    def as_text(self) -> str:
        """Its figures, for people."""
        rates = ", ".join(f"{n}: {rate / 1e9:,.0f}" for n, rate in self.gemm_rates)
        kv = (self.kv_bandwidth or self.bandwidth) / 1e9
        return (
            f"matrix products, GFLOP/s by tokens: {rates}\n"
            f"attention {self.attention_rate / 1e9:,.0f} GFLOP/s, memory "
            f"{self.bandwidth / 1e9:,.1f} GB/s, KV {kv:,.1f} GB/s\n"
            f"a step {self.step_seconds * 1e3:.2f} ms, a token {self.token_seconds * 1e6:.1f} us, "
            f"a sample {self.sample_seconds * 1e6:.1f} us, a segment "
            f"{self.segment_seconds * 1e3:.2f} ms"
        )

    def kv_tokens(self, shape: ModelShape) -> int:
        """Tokens whose KV fits beside the weights.

        Raises:
            UsageError: the weights do not fit.
        """
        left = self.memory - shape.weight_bytes
        if left <= 0:
            raise UsageError(
                f"the model's {shape.weight_bytes / 2**30:.1f} GiB of weights do not fit "
                f"{self.name}'s {self.memory / 2**30:.0f} GiB"
            )
        return int(left * _KV_SHARE / shape.kv_bytes_per_token)


def _gpu(
    name: str, flops: float, bandwidth: float, memory: float, limits: tuple[int, int]
) -> Machine:
    """A GPU from its datasheet: dense bfloat16 FLOP/s, bytes/s, GB; and vLLM's limits there.

    Reached are about 70 % of a large product's FLOP/s, 50 % of it in attention (FlashAttention-2
    and -3 with heads of 128 and a causal mask) and 85 % of the bandwidth; small products are bound
    by reading the weights, which the cost model adds itself. A step's launches take 2 ms. On two
    fifths of a chip, attention is taken to read at four fifths of its bandwidth: a guess in the
    spirit of NanoFlow (arXiv 2408.12757), which measured such shares, until a GPU says better.
    """
    return Machine(
        name=name,
        gemm_rates=((1, 0.6 * flops), (256, 0.6 * flops), (2048, 0.7 * flops)),
        attention_rate=0.5 * flops,
        bandwidth=0.85 * bandwidth,
        memory=int(memory * 1e9),
        step_seconds=2e-3,
        one_attention_launch=True,
        overlap_share=0.4,
        overlap_speed=0.8,
        max_num_batched_tokens=8192,
        streaming_batched_tokens=limits[0],
        streaming_num_seqs=limits[1],
    )


MACHINES: dict[str, Machine] = {
    "h100": _gpu("h100", 989e12, 3.35e12, 80, (16384, 1024)),
    "h200": _gpu("h200", 989e12, 4.8e12, 141, (16384, 1024)),
    "a100": _gpu("a100", 312e12, 2.04e12, 80, (8192, 256)),
    # Two AVX-512 cores with bfloat16 dot products, torch 2.13 (`batchllm bench --calibrate`).
    "cpu": Machine(
        name="cpu",
        gemm_rates=((4, 137e9), (16, 280e9), (32, 345e9), (64, 380e9), (256, 430e9)),
        attention_rate=250e9,
        bandwidth=34e9,
        memory=8 << 30,
        step_seconds=5e-3,
        streaming_batched_tokens=4096,
    ),
}


# Two cores with matrix tiles (AMX), measured the same way.
_TILES = Machine(
    name="cpu",
    gemm_rates=(
        *((1, 32e9), (4, 126e9), (16, 470e9), (32, 890e9), (64, 1450e9), (128, 1790e9)),
        *((256, 2280e9), (512, 2750e9), (2048, 3330e9)),
    ),
    attention_rate=590e9,
    bandwidth=31e9,
    memory=8 << 30,
    step_seconds=6.8e-3,
    token_seconds=12e-6,
    sample_seconds=76e-6,
    kv_bandwidth=14.6e9,
    segment_seconds=0.14e-3,
    streaming_batched_tokens=4096,
)
_MEASURED_CORES = 2
_MOST_READING = 16  # cores that a socket's memory keeps up with
# What each kind of kernels (native/kernels.py) computes, of what the machine it is taken for does.
_CPU_SPEEDS = {"amx": 1.0, "avx512_bf16": 1.0, "avx512_vnni": 0.75, "avx512": 0.75}
_OTHER_SPEED = 0.3  # AVX2's


def cpu_machine(kernels: str | None, num_cores: int) -> Machine:
    """A CPU by the kind of kernels that run on it and its cores, until it is measured.

    Cores are taken to be as fast as the two of a kind that were measured, and to read as fast, up
    to as many as a socket's memory serves.
    """
    machine = _TILES if kernels == "amx" else MACHINES["cpu"]
    cores = num_cores / _MEASURED_CORES
    reading = min(num_cores, _MOST_READING) / _MEASURED_CORES
    speed = cores * _CPU_SPEEDS.get(kernels or "", _OTHER_SPEED)
    kv = machine.kv_bandwidth
    return replace(
        machine,
        gemm_rates=tuple((tokens, rate * speed) for tokens, rate in machine.gemm_rates),
        attention_rate=machine.attention_rate * speed,
        bandwidth=machine.bandwidth * reading,
        kv_bandwidth=None if kv is None else kv * reading,
        token_seconds=machine.token_seconds / cores,
        sample_seconds=machine.sample_seconds / cores,
        segment_seconds=machine.segment_seconds / cores,
    )


def gpu_machine(name: str) -> Machine:
    """What a GPU can do that its driver calls `name`, or a like one if it is not known."""
    known = next((m for m in ("h200", "h100", "a100") if m in name.lower()), "a100")
    return MACHINES[known]


def get_machine(name: str) -> Machine:
    """Look a built-in machine up.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in MACHINES:
        raise UsageError(f"no machine named {name!r}; there are: {', '.join(MACHINES)}")
    return MACHINES[name]
