"""Guides that run: the python blocks of a page, top to bottom, as a reader would enter them."""

import re
from contextlib import chdir
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_guide(path, folder):
    """Run a page's blocks in a folder that has the project's `datasets`; returns their names."""
    text = path.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert blocks, f"{path} has no python blocks"
    (folder / "datasets").symlink_to(ROOT / "datasets")
    names = {"__name__": "guide"}
    with chdir(folder):
        for block in blocks:
            lines_before = text.count("\n", 0, block.start(1))
            exec(compile("\n" * lines_before + block[1], str(path), "exec"), names)
    return names
