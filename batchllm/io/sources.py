"""Which files INPUT means: a file, a directory or a glob, in the one order that numbers the rows.

Files sort by their path below INPUT's fixed part (the directory, or what precedes a glob's first
wildcard). The same part-path gives the hive columns, so moving a data set changes nothing.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from batchllm.errors import InputError, UsageError
from batchllm.io.durable import one_line_reason

PARQUET_MAGIC = b"PAR1"
PARQUET_SUFFIXES = (".parquet", ".pq", ".parq")
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One input file: where it is, and its posix path below INPUT's fixed part."""

    path: Path
    name: str

    @property
    def hive_values(self) -> dict[str, str | None]:
        """The `key=value` directories on the way to the file, decoded; null for hive's null."""
        pairs = (part.split("=", 1) for part in self.name.split("/")[:-1] if "=" in part)
        return {
            unquote(key): None if value == _HIVE_NULL else unquote(value)
            for key, value in pairs
            if key
        }


def find_files(source: str | Path) -> list[SourceFile]:
    """List the Parquet files of `source` in row order.

    A directory is searched recursively; names that start with `_` or `.` are left out, and so are
    files that have neither a Parquet suffix nor Parquet's first four bytes.

    Raises:
        InputError: the path is missing, the glob matches nothing, or there is no Parquet file.
    """
    try:
        files = _list_files(Path(source))
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        raise InputError(f"{source}: cannot be read: {one_line_reason(error)}") from error
    return sorted(files, key=lambda file: file.name)


def _list_files(path: Path) -> set[SourceFile]:
    if path.is_dir():
        files = {SourceFile(file, file.relative_to(path).as_posix()) for file in _walk(path)}
        if not files:
            raise InputError(f"{path}: the directory holds no Parquet file")
        return files
    if os.path.lexists(path):
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a regular file")
        return {SourceFile(path, path.name)}
    if _WILDCARD.search(str(path)):
        files = set(_expand(path))
        if not files:
            raise InputError(f"{path}: the pattern matches no Parquet file")
        return files
    raise InputError(f"{path}: no such file or directory")


def _expand(pattern: Path) -> Iterator[SourceFile]:
    fixed, wild = _split_pattern(pattern)
    # A name the user spelled out is wanted even when it starts with _ or a dot.
    spelled_out = any(not _visible(part) for part in wild.parts)
    for match in fixed.glob(str(wild)):
        name = match.relative_to(fixed)
        if not spelled_out and not all(_visible(part) for part in name.parts):
            continue
        for file in _walk(match) if match.is_dir() else [match]:
            yield SourceFile(file, file.relative_to(fixed).as_posix())


def _split_pattern(pattern: Path) -> tuple[Path, Path]:
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if _WILDCARD.search(part))
    return Path(*parts[:first]), Path(*parts[first:])


def _visible(name: str) -> bool:
    return not name.startswith(("_", "."))


def _walk(root: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed: {one_line_reason(error)}")

    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        here = Path(os.path.realpath(folder))
        # A link to a directory above would send the walk round for ever.
        folders[:] = [
            name
            for name in folders
            if _visible(name) and not here.is_relative_to(os.path.realpath(here / name))
        ]
        for name in names:
            file = Path(folder, name)
            if _visible(name) and (name.endswith(PARQUET_SUFFIXES) or _has_magic(file)):
                yield file


def _has_magic(file: Path) -> bool:
    try:
        if not file.is_file():  # opening a pipe would wait for its writer
            return False
        with file.open("rb") as opened:
            return opened.read(4) == PARQUET_MAGIC
    except OSError:
        return False


def check_paths(source: str | Path, output: str | Path) -> None:
    """Refuse an OUTPUT that is, lies in, or contains INPUT: a rerun would read its own answers.

    Raises:
        UsageError: the two overlap.
        InputError: INPUT cannot be looked at.
    """
    for role, path in (("INPUT", source), ("OUTPUT", output)):
        if "\0" in str(path) or not _encodable(path):
            raise UsageError(f"{role} {str(path)!r} cannot be a file's name")
    try:
        overlap = _overlap(Path(source), Path(os.path.realpath(output)))
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {one_line_reason(error)}") from error
    if overlap:
        raise UsageError(
            f"OUTPUT {output} and INPUT {source} overlap; choose an output outside the input"
        )


def _encodable(path: str | Path) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _overlap(source: Path, target: Path) -> bool:
    if not source.exists() and _WILDCARD.search(str(source)):
        fixed, wild = _split_pattern(source)
        fixed = Path(os.path.realpath(fixed))
        # An output that is a directory is reached through its parts, too.
        reached = (target / "part-0-0.parquet", target, *target.parents)
        return fixed.is_relative_to(target) or any(_may_match(p, fixed, wild) for p in reached)
    origin = Path(os.path.realpath(source))
    if target.exists() and origin.exists() and target.samefile(origin):
        return True  # two names of one file
    return target.is_relative_to(origin) or origin.is_relative_to(target)


def _may_match(path: Path, fixed: Path, wild: Path) -> bool:
    """Whether a later expansion of the pattern would reach `path`; `**` stands for anything."""
    if not path.is_relative_to(fixed):
        return False
    if "**" in wild.parts:
        return path.match(wild.parts[-1])
    below = path.relative_to(fixed)
    return len(below.parts) == len(wild.parts) and below.match(str(wild))
