"""The control groups that this process is in: any of them may set a limit, and all limits hold.

Containers, batch systems and service managers set limits by cgroups, often some levels above the
process itself. Version 2 has one tree for everything; version 1 has one for each controller, and a
machine may have both.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC = Path("/proc/self")


def cgroup_dirs(controller: str, proc: Path = PROC) -> list[Path]:
    """Directories of this process's cgroup and its parents, innermost first, of both versions.

    What is above a container's own root cannot be seen. Empty where there are no cgroups.
    """
    own = _own_cgroups(proc / "cgroup")
    inside: dict[str, list[Path]] = {}
    outside: dict[str, list[Path]] = {}
    for hierarchy, root, mount in _mounts(proc / "mountinfo", controller):
        if hierarchy not in own:
            continue
        below = _below(own[hierarchy], root)
        if below is None:  # seen from another namespace: what is mounted is the best there is
            outside.setdefault(hierarchy, [mount])
        else:
            levels = [mount / below, *(mount / below).parents]
            inside.setdefault(hierarchy, levels[: len(below.parts) + 1])
    return [path for levels in (outside | inside).values() for path in levels]


def read_text(path: Path) -> str | None:
    """A kernel file's text; None where there is no such file."""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def read_int(path: Path) -> int | None:
    """A kernel file's number; None where there is no such file, or it says `max`."""
    try:
        return int(read_text(path) or "")
    except ValueError:
        return None


def _own_cgroups(path: Path) -> dict[str, str]:
    """From controller to the process's path in that one's hierarchy; version 2 is at ""."""
    lines = [line.split(":", 2) for line in (read_text(path) or "").splitlines()]
    return {name: line[2] for line in lines if len(line) == 3 for name in line[1].split(",")}


def _below(path: str, root: str) -> PurePosixPath | None:
    """A cgroup's path below the one that is mounted; None where it is not below it."""
    try:
        below = PurePosixPath(path).relative_to(root)
    except ValueError:
        return None
    return None if ".." in below.parts else below


def _mounts(path: Path, controller: str) -> Iterator[tuple[str, str, Path]]:
    """Where hierarchies with this controller are mounted: name, root within it, directory."""
    for line in (read_text(path) or "").splitlines():
        before, _, after = line.partition(" - ")
        kind, options = after.split(" ")[0], after.split(" ")[-1]
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            root, mount = (_unescaped(text) for text in before.split(" ")[3:5])
            yield "" if kind == "cgroup2" else controller, root, Path(mount)


def _unescaped(text: str) -> str:
    r"""Blanks and backslashes are written like `\040` in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text)
