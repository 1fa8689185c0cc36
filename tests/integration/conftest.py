import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import tiny_config, write_safetensors_model
from cli_runs import ROWS

from batchllm import LLM, SamplingParams


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random two-layer Llama over bytes: answers are noise, but always the same noise."""
    config = tiny_config(max_position_embeddings=512)
    return write_safetensors_model(tmp_path_factory.mktemp("models") / "tiny", config=config)


@pytest.fixture
def table():
    """Rows that share their beginning, some of them duplicates."""
    rng = np.random.default_rng(0)
    return pa.table(
        {
            "id": pa.array(range(ROWS), pa.int64()),
            "text": [f"shared words {'z' * int(rng.integers(9))} {i % 20}" for i in range(ROWS)],
            "limit": pa.array([1 + i % 9 for i in range(ROWS)], pa.int16()),
            "nested": [{"a": [i], "b": str(i)} for i in range(ROWS)],
        }
    ).replace_schema_metadata({"made by": "a test"})


@pytest.fixture
def source(table, tmp_path):
    path = tmp_path / "in.parquet"
    pq.write_table(table, path, row_group_size=13)
    return path


@pytest.fixture
def expected(table, tiny_model):
    llm = LLM(tiny_model, kv_memory=16 << 20)
    params = SamplingParams(max_tokens=6)
    return [o.text for o in llm.generate(table["text"].to_pylist(), params)]
