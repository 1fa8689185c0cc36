"""Where an optional library is missing, the message says how to get it."""

import importlib
import sys

import pytest

from batchllm.errors import UsageError

EXTRAS = ("polars", "datasets", "ray")


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_library_is_named(extra, monkeypatch):
    monkeypatch.setitem(sys.modules, extra, None)  # imports fail as if it were not installed
    monkeypatch.delitem(sys.modules, f"batchllm.{extra}", raising=False)
    with pytest.raises(UsageError, match=rf"pip install 'batchllm\[{extra}\]'"):
        importlib.import_module(f"batchllm.{extra}")
