"""The same job on the default model with other windows, threads and memory: the same answers."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from cli_runs import invoke

from batchllm.native.kernels import load_kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(load_kernels() is None, reason="no kernels were compiled"),
]
EXAMPLE = Path(__file__).parents[2] / "datasets" / "example.parquet"
ROWS = 8
WAYS = [
    ("--threads", 2, "--kv-memory", "1G"),
    ("--threads", 1, "--kv-memory", "128M", "--window-rows", 6, "--max-num-batched-tokens", 300),
    ("--threads", 2, "--kv-memory", "64M", "--window-rows", 5, "--max-num-seqs", 5),
]


def test_three_times_the_same(tmp_path):
    words = ("--template", "{{ text }}\n\n{{ question }}", "--limit", ROWS, "--quiet")
    tables = []
    for number, way in enumerate(WAYS):
        output = tmp_path / f"{number}.parquet"
        result = invoke(
            *("run", EXAMPLE, output, *words, "--max-tokens", 12),
            *("--temperature", 0.8, "--seed", 3, "--deterministic", *way),
        )
        assert result.exit_code == 0, result.stderr
        tables.append(pq.read_table(output).drop_columns("cached_tokens"))
    assert tables[0]["error"].null_count == ROWS
    assert tables[1].equals(tables[0])
    assert tables[2].equals(tables[0])
