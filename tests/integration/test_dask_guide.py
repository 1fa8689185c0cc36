"""docs/DASK.md does what it says."""

import pytest
from guides import run_guide

pytest.importorskip("distributed")
pytestmark = pytest.mark.dask


def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    run_guide("DASK.md", tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "(2 model loads)" in said and "no worker has resources={'GPU': 1}" in said
