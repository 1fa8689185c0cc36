"""The bound of scripts/bench_engines/bound.py against a case done by hand, and brute force."""

import numpy as np
import pytest
from yardstick import load_bound

b = load_bound()

TINY = b.ModelShape(layers=2, hidden=4, intermediate=6, q_heads=2, kv_heads=1, head_dim=2, vocab=10)


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def test_model_sizes():
    # One layer: qkv 4·8, out 4·4, gate and up 4·12, down 6·4 = 120.
    assert TINY.body_parameters == 240
    assert TINY.head_parameters == 40
    assert TINY.weight_bytes == 560
    assert TINY.kv_bytes_per_token == 2 * 2 * 1 * 2 * 2
    assert b.SMOLLM2_135M.body_parameters + b.SMOLLM2_135M.head_parameters == pytest.approx(
        134.5e6, rel=0.001
    )


def test_two_rows_by_hand():
    prompts = [tokens(1, 2, 3), tokens(1, 2, 4, 5)]
    work = b.measure(prompts, [3, 2])
    assert work == b.Workload(
        tree_tokens=5,  # 1 2 | 3 | 4 5
        decode_tokens=2 + 1,
        output_tokens=5,
        longest_output=3,
        attended_positions=1 + 2 + 3 + 3 + 4,
        # 1 2 in both steps of the longer answer, 3 twice, 4 5 once; then row 0's second decode
        # step reads its first output token.
        kv_tokens_read=2 * 2 + 1 * 2 + 2 * 1 + 1,
    )
    got = b.bound(TINY, work, b.Rates(flops=1000.0, bandwidth=100.0))
    assert got.gemm == pytest.approx((2 * 240 * (5 + 3) + 2 * 40 * 5) / 1000)
    assert got.attention == pytest.approx(4 * 2 * 2 * 2 * 13 / 1000)
    assert got.kv_read == pytest.approx(16 * 9 / 100)
    assert got.steps == 3
    assert got.weight_read == pytest.approx(3 * 560 / 100)
    assert got.overlap == pytest.approx(16.8 + 1.44)
    assert got.total == pytest.approx(4.24 + 0.416 + 1.44 + 16.8)


def test_little_kv_memory_takes_more_steps():
    work = b.measure([tokens(1, 2, 3), tokens(1, 2, 4, 5)], [3, 2])
    assert b.least_steps(work, None) == 3
    assert b.least_steps(work, 100) == 3
    assert b.least_steps(work, 2) == 5  # 9 tokens read, 2 fit a step


def test_arithmetic_bound():
    work = b.measure([tokens(1)], [1])
    got = b.bound(TINY, work, b.Rates(flops=1.0, bandwidth=1e9))
    assert got.overlap == got.gemm + got.attention


@pytest.mark.parametrize(
    ("prompts", "outputs"),
    [([], []), ([tokens(1)], [0]), ([tokens()], [1]), ([tokens(1)], [1, 1])],
)
def test_refuses_what_is_no_workload(prompts, outputs):
    with pytest.raises(ValueError):
        b.measure(prompts, outputs)


def brute_force(prompts: list[np.ndarray], outputs: list[int]) -> object:
    """By definition: every distinct prefix is a token, read as long as any row below decodes."""
    steps: dict[tuple[int, ...], int] = {}
    for prompt, length in zip(prompts, outputs, strict=True):
        for end in range(1, len(prompt) + 1):
            prefix = tuple(prompt[:end].tolist())
            steps[prefix] = max(steps.get(prefix, 0), length - 1)
    own = sum(j - 1 for length in outputs for j in range(1, length))
    return b.Workload(
        tree_tokens=len(steps),
        decode_tokens=sum(outputs) - len(outputs),
        output_tokens=sum(outputs),
        longest_output=max(outputs),
        attended_positions=sum(len(prefix) for prefix in steps),
        kv_tokens_read=sum(steps.values()) + own,
    )


@pytest.mark.parametrize("vocab", [2, 3, 300])  # 300: ids of more than one byte
def test_equals_brute_force(vocab):
    rng = np.random.default_rng(vocab)
    for _ in range(300):
        rows = int(rng.integers(1, 12))
        prompts = [rng.integers(0, vocab, rng.integers(1, 7), dtype=np.int32) for _ in range(rows)]
        outputs = rng.integers(1, 6, rows).tolist()
        assert b.measure(prompts, outputs) == brute_force(prompts, outputs)
