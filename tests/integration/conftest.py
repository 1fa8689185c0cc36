import pytest
from builders import tiny_config, write_safetensors_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random two-layer Llama over bytes: answers are noise, but always the same noise."""
    config = tiny_config(max_position_embeddings=512)
    return write_safetensors_model(tmp_path_factory.mktemp("models") / "tiny", config=config)
