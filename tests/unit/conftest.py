"""What holds for all unit tests."""

import os

import pytest


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No test here depends on the disk having really been waited for."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
