"""The ladder's tables: speed-ups and their means, on made-up runs."""

import pytest
from ladder_runs import results, run


def both_orders(workload, shuffled, by_order, **fields):
    return [
        run(workload, "vllm", shuffled, load=50, **fields),
        run(workload, "vllm", by_order, load=50, order="sorted", **fields),
    ]


def test_the_better_order_of_each_round_counts():
    runs = [
        *[run("a", "batchllm", seconds, number=n) for n, seconds in enumerate((10, 20, 10), 1)],
        *both_orders("a", 30, 20, number=1),  # 2.0
        *both_orders("a", 30, 50, number=2),  # 1.5
        *both_orders("a", 90, 80, number=3),  # 8.0
    ]
    found = results.speedup(runs, "a", "batchllm", "vllm")
    assert found.engine == 2.0
    # 70 ÷ 11, 80 ÷ 21, 130 ÷ 11
    assert found.whole == pytest.approx(70 / 11)


def test_rounds_that_one_of_both_missed_do_not_count():
    runs = [
        run("a", "batchllm", 10, number=1),
        run("a", "batchllm", 1, number=2),
        run("a", "vllm", 30, number=1),
    ]
    assert results.speedup(runs, "a", "batchllm", "vllm").engine == 3.0
    assert results.speedup(runs, "a", "batchllm", "transformers") is None
    assert results.speedup(runs, "b", "batchllm", "vllm") is None


def test_lines_have_ours_first_and_no_speed_up_over_itself():
    runs = [
        *both_orders("b", 40, 20),
        run("b", "batchllm", 10),
        run("b", "batchllm", 8, order="sorted"),
        run("a", "batchllm", 5),
        run("b", "transformers", 80),
    ]
    lines = results.summarise(runs)
    assert [(line.workload, line.label) for line in lines] == [
        ("b", "batchllm"),
        ("b", "batchllm, sorted"),
        ("b", "transformers"),
        ("b", "vllm"),
        ("b", "vllm, sorted"),
        ("a", "batchllm"),
    ]
    speedups = [line.over_peer and line.over_peer.engine for line in lines]
    assert speedups == [2.0, 2.5, 0.25, None, None, None]
    assert [line.overlap_share for line in lines[:2]] == [0.2, 0.25]
    assert lines[0].tokens_per_second == 100


def test_means_are_geometric_and_shared_ones_apart():
    runs = [
        *[run(name, "batchllm", 10) for name in ("a", "b")],
        run("c", "batchllm", 10, shared=False),
        *both_orders("a", 20, 30),
        *both_orders("b", 80, 90),
        *both_orders("c", 5, 6, shared=False),
    ]
    shared, everything = results.means(runs)
    assert (shared.over, shared.workloads, everything.over, everything.workloads) == (
        "shared",
        2,
        "all",
        3,
    )
    assert shared.speedup.engine == pytest.approx(4.0)
    assert everything.speedup.engine == pytest.approx((2 * 8 * 0.5) ** (1 / 3))
    assert shared.speedup.whole == pytest.approx(((70 / 11) * (130 / 11)) ** 0.5)


def test_every_variant_is_held_against_every_peer():
    runs = [
        run("a", engine, seconds)
        for engine, seconds in (
            ("batchllm", 10),
            ("batchllm-int8", 5),
            ("vllm", 20),
            ("vllm-int8", 15),
        )
    ]
    found = {(m.ours, m.peer): m.speedup.engine for m in results.means(runs) if m.over == "all"}
    assert found == pytest.approx(
        {
            ("batchllm", "vllm"): 2.0,
            ("batchllm", "vllm-int8"): 1.5,
            ("batchllm-int8", "vllm"): 4.0,
            ("batchllm-int8", "vllm-int8"): 3.0,
        }
    )


def test_the_report_says_all_of_it():
    text = results.markdown([run("a", "batchllm", 10), *both_orders("a", 40, 20)])
    assert "| a | batchllm | 10.0 | 1.0 | 100 | 2.00 | 6.36 | 20% |" in text
    assert "|  | vllm, sorted | 20.0 | 50.0 | 50 |  |  | 10% |" in text
    assert "| vllm ÷ batchllm | 1, shared | 2.00 | 6.36 |" in text
    assert "| a | 10 | 900 | 300 | 100 |" in text
    assert "bf16 400 GFLOP/s, int8 800 GOP/s, memory 40.0 GB/s" in text


def test_a_report_without_peers_has_no_means():
    text = results.markdown([run("a", "batchllm", 10)])
    assert "geometric" not in text
    assert "| a | batchllm | 10.0 | 1.0 | 100 |  |  | 20% |" in text
