"""A guide under docs/, run as its reader would: its Python blocks one after the other."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def run_guide(name, directory, monkeypatch):
    """Run the blocks where the project's `datasets` are too; returns the names they defined."""
    text = (DOCS / name).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks, f"{name} has nothing to run"
    (directory / "datasets").symlink_to(ROOT / "datasets")
    monkeypatch.chdir(directory)
    names = {"__name__": "guide"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))  # so that an error says where it is
        exec(compile("\n" * line + block[1], str(DOCS / name), "exec"), names)
    return names
