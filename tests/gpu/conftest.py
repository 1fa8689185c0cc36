import gc

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu():
    """Tests here need one; what each took of its memory is given back."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    yield
    gc.collect()
    torch.cuda.empty_cache()
