"""The manifest: which job an output belongs to, and which answers of it are safely on disk.

One JSON line per event, appended and fsynced, each with a checksum over its exact bytes. The first
line names the job. A line that a crash cut short can only be the last one; it is dropped, and the
rows it stood for are computed again. Damage anywhere else means that the file cannot be trusted.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchllm.errors import OutputError
from batchllm.io.durable import AppendFile, atomic_write
from batchllm.io.identity import describe_differences

FORMAT_VERSION = 3
_PREFIX = b'{"crc32":"%08x","data":'
_PREFIX_LENGTH = len(_PREFIX % 0)


@dataclass(frozen=True, slots=True)
class Job:
    """What an output belongs to: the caller's identity, rows in all, and column name to type."""

    identity: Mapping[str, Any]
    num_rows: int
    columns: Mapping[str, str]

    def differences_from(self, stored: "Job") -> str:
        """How this job differs from the stored one, for a message; empty when it does not."""
        found = (
            describe_differences(stored.identity, self.identity),
            describe_differences(stored._shape, self._shape),
        )
        return "; ".join(filter(None, found))

    @property
    def _shape(self) -> dict[str, Any]:
        return {"num_rows": self.num_rows, "columns": self.columns}


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file on disk: its name and size."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class AnswersRecord:
    """Answers on disk: their file, how many rows they are of, how many failed, counters."""

    file: FileRecord
    num_rows: int
    failed: int
    counters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FinishedRecord:
    """A finished job: its summary, the files that are its output, its answers' `ContentHash`."""

    summary: Mapping[str, Any]
    parts: Sequence[FileRecord]
    answers_sha256: str


@dataclass(slots=True)
class ManifestState:
    """What a manifest says. `finished` is None until the job is.

    `answers` are in the order in which they were written; `next_number` is how many files of them
    there have ever been; `num_valid_bytes` is where a torn last line starts.
    """

    job: Job
    answers: list[AnswersRecord] = field(default_factory=list)
    next_number: int = 0
    finished: FinishedRecord | None = None
    num_valid_bytes: int = 0


def read_manifest(path: Path) -> ManifestState | None:
    """Read a manifest without changing it; None where there is none.

    Raises:
        OutputError: the first line, or one with lines after it, is damaged; or the format is not
            ours. No crash does that: the first line appears whole, and later ones only last.
        OSError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    state: ManifestState | None = None
    start = 0
    if not content:
        raise damaged_manifest(path, 1)
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        data = _decode(line)
        if data is None:
            if state is None or start + len(line) < len(content):
                raise damaged_manifest(path, number)
            break
        start += len(line)
        try:
            state = _apply(path, state, data)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise OutputError(f"{path}: line {number} is not a batchllm manifest's") from None
        state.num_valid_bytes = start
    return state


class Manifest:
    """The appending side of a manifest. Not for two threads at once.

    Raises:
        OSError: from any method; a line that could not be written whole is taken back.
    """

    def __init__(self, path: Path, num_valid_bytes: int) -> None:
        self._file = AppendFile(path, num_valid_bytes)

    @classmethod
    def create(cls, path: Path, job: Job, answers: Sequence[AnswersRecord] = ()) -> "Manifest":
        """Start a manifest: the file appears with its first lines or not at all."""
        first = {
            "type": "job",
            "version": FORMAT_VERSION,
            "identity": job.identity,
            "num_rows": job.num_rows,
            "columns": job.columns,
        }
        lines = b"".join(map(_encode, [first, *map(_answers_line, answers)]))
        with atomic_write(path, path.with_name(path.name + ".tmp")) as file:
            file.write(lines)
        return cls(path, len(lines))

    def append_answers(self, record: AnswersRecord, *, replaces: str | None = None) -> None:
        """Put answers on record, in the place of those of the file `replaces` where given."""
        line = _answers_line(record)
        self._append(line if replaces is None else {**line, "replaces": replaces})

    def append_finished(self, record: FinishedRecord) -> None:
        parts = [{"file": part.name, "bytes": part.num_bytes} for part in record.parts]
        self._append(
            {
                "type": "finished",
                "summary": record.summary,
                "parts": parts,
                "answers_sha256": record.answers_sha256,
            }
        )

    def append_reopened(self, kept: AnswersRecord) -> None:
        """Make a finished job unfinished, but for the answers that are kept."""
        self._append({**_answers_line(kept), "type": "reopened"})

    def close(self) -> None:
        self._file.close()

    def _append(self, data: Mapping[str, Any]) -> None:
        self._file.append(_encode(data), sync=True)


def _answers_line(record: AnswersRecord) -> dict[str, Any]:
    return {
        "type": "answers",
        "file": record.file.name,
        "bytes": record.file.num_bytes,
        "rows": record.num_rows,
        "failed": record.failed,
        "counters": record.counters,
    }


def _encode(data: Mapping[str, Any]) -> bytes:
    payload = json.dumps(data, separators=(",", ":")).encode()
    return _PREFIX % zlib.crc32(payload) + payload + b"}\n"


def _decode(line: bytes) -> Any:  # noqa: ANN401 - whatever JSON holds; _apply checks it
    payload = line[_PREFIX_LENGTH:-2]
    if line != _PREFIX % zlib.crc32(payload) + payload + b"}\n":
        return None
    return json.loads(payload)


def _apply(path: Path, state: ManifestState | None, data: Any) -> ManifestState:  # noqa: ANN401
    if state is None:
        if data["type"] != "job":
            raise ValueError("the first line is not the job's")
        if data["version"] != FORMAT_VERSION:
            raise wrong_version(path, data["version"])
        return ManifestState(Job(data["identity"], data["num_rows"], data["columns"]))
    if data["type"] in ("answers", "reopened"):
        if data["type"] == "reopened":
            state.answers, state.finished = [], None
        state.answers = [a for a in state.answers if a.file.name != data.get("replaces")]
        file = FileRecord(data["file"], data["bytes"])
        state.answers.append(AnswersRecord(file, data["rows"], data["failed"], data["counters"]))
        state.next_number += 1
    elif data["type"] == "finished":
        parts = [FileRecord(part["file"], part["bytes"]) for part in data["parts"]]
        state.finished = FinishedRecord(data["summary"], parts, data["answers_sha256"])
    else:
        raise ValueError(f"unknown line type {data['type']!r}")
    return state


def wrong_version(path: Path, version: object) -> OutputError:
    """The error for an output that another version of the format wrote."""
    return OutputError(
        f"{path}: has format {version} of another batchllm, this one writes {FORMAT_VERSION};"
        " use another output path"
    )


def damaged_manifest(path: Path, line: int) -> OutputError:
    """The error for a line that no crash explains: the disk or somebody changed it."""
    return OutputError(f"{path}: line {line} is damaged; delete the output to start over")
