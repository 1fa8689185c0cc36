"""Where an optional library is missing, the message says how to get it."""

import importlib
import sys

import pytest

from batchllm.errors import UsageError

LIBRARIES = {extra: extra for extra in ("polars", "datasets", "ray", "dask")} | {"spark": "pyspark"}


@pytest.mark.parametrize(("extra", "library"), LIBRARIES.items())
def test_a_missing_library_is_named(extra, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)  # imports fail as if it were not installed
    for module in [name for name in sys.modules if name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, f"batchllm.{extra}", raising=False)
    with pytest.raises(UsageError, match=rf"pip install 'batchllm\[{extra}\]'"):
        importlib.import_module(f"batchllm.{extra}")
