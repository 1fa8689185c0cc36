"""ARCHITECTURE.md and the README speak of things that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_path_in_the_architecture_exists():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    paths = re.findall(r"`((?:batchllm|tests|scripts|datasets|\.ci)/[\w./-]*)`", text)
    assert len(paths) > 40
    for path in paths:
        assert (ROOT / path).exists(), path


def test_every_module_has_its_line():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for path in sorted((ROOT / "batchllm").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if path.name != "__init__.py":
            assert f"`{name}`" in text, f"{name} has no line"


def test_every_name_in_the_architecture_is_defined():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    source = "\n".join(p.read_text() for p in (ROOT / "batchllm").rglob("*.py"))
    names = set(re.findall(r"`([A-Z]\w+(?:\.\w+)?)`", text))
    assert len(names) > 10
    for name in names:
        for part in name.split("."):
            assert re.search(rf"(class|def) {part}\b|\b{part}: |\b{part} = ", source), name


def test_readme_options_exist():
    source = (ROOT / "batchllm" / "cli.py").read_text()
    text = (ROOT / "README.md").read_text()
    options = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text))
    assert len(options) > 10
    known = source.replace("_", "-")
    for option in options - {"help"}:
        assert option.removeprefix("no-") in known, f"--{option}"
