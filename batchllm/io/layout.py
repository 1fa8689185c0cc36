"""Where an output keeps what: the one place that knows names and tells ours from others'.

A single file has a hidden work directory beside it, holding answers, manifest and lock until it is
finished. A directory has its work directory inside, `_batchllm`, where readers of Parquet
directories do not look, and its parts appear when all answers are there.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchllm.errors import InputError, OutputError
from batchllm.io.manifest import FORMAT_VERSION, AnswersRecord, FileRecord, Job, wrong_version
from batchllm.io.parts import is_part_name, read_record

FILE_SUFFIXES = (".parquet", ".pq")
_ANSWERS_NAME = re.compile(r"answers-\d{6,}\.parquet")


@dataclass(frozen=True, slots=True)
class FinishedFile:
    """What a finished output says about itself; a single file does so in its metadata."""

    job: Job
    summary: Mapping[str, Any]
    answers_sha256: str

    @property
    def has_failed(self) -> bool:
        """Whether there are rows without an answer."""
        return int(self.summary.get("failed", 0)) > 0

    def record(self) -> dict[str, Any]:
        """The `batchllm` entry of the file's metadata."""
        return {
            "version": FORMAT_VERSION,
            "identity": self.job.identity,
            "num_rows": self.job.num_rows,
            "columns": self.job.columns,
            "summary": self.summary,
            "answers_sha256": self.answers_sha256,
        }


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """The paths of one output.

    Attributes:
        shown: the path as the user gave it, for messages.
        target: where it really is, links followed.
        work: the directory of manifest, lock, answers, temporary files.
        single_file: whether the output is one file.
    """

    shown: Path
    target: Path
    work: Path
    single_file: bool

    @classmethod
    def of(cls, path: str | Path) -> "OutputLayout":
        """An output that ends in `.parquet` or `.pq` is a file, any other a directory."""
        shown = Path(path)
        target = Path(os.path.realpath(shown))
        if shown.name.endswith(FILE_SUFFIXES):
            work = target.with_name(f".{target.name}.batchllm")
            return cls(shown, target, work, True)
        return cls(shown, target, target / "_batchllm", False)

    @property
    def manifest(self) -> Path:
        return self.work / "manifest.jsonl"

    @property
    def journal(self) -> Path:
        return self.work / "journal"

    @property
    def in_flight(self) -> Path:
        return self.work / "in-flight"

    @property
    def crash(self) -> Path:
        return self.work / "crash"

    @property
    def suspects(self) -> Path:
        return self.work / "suspects.json"

    @property
    def only_while_unfinished(self) -> tuple[Path, ...]:
        """The files beside answers and manifest that a complete output has no use for."""
        return self.journal, self.in_flight, self.crash, self.suspects

    @property
    def lock(self) -> Path:
        return self.work / "lock"

    @property
    def summary(self) -> Path:
        return self.work / "summary.json"

    @property
    def to_delete(self) -> Path:
        """What a user deletes to start over."""
        return self.work if self.single_file and not self.target.exists() else self.shown

    def read_finished_file(self) -> FinishedFile | None:
        """What the finished single file says; None where there is no such file yet.

        Raises:
            OutputError: something that is not a finished output of ours is in its place.
        """
        if not self.single_file or not self.target.exists():
            return None
        if self.target.is_dir():
            raise OutputError(f"{self.shown}: is a directory, but an output of that name is a file")
        try:
            record = read_record(self.target)
        except InputError as error:
            raise OutputError(f"{error}; refusing to overwrite it") from error
        if record is None or "summary" not in record:
            raise OutputError(
                f"{self.shown}: exists and is no finished batchllm output; refusing to overwrite it"
            )
        if record["version"] != FORMAT_VERSION:
            raise wrong_version(self.shown, record["version"])
        job = Job(record["identity"], record["num_rows"], record["columns"])
        return FinishedFile(job, record["summary"], record["answers_sha256"])

    def refuse_foreign(self) -> None:
        """Make sure that nothing but our own files is where parts and manifest go.

        Raises:
            OutputError: there is something else.
        """
        folder = self.work if self.single_file else self.target
        if not folder.exists():
            return
        if not folder.is_dir():
            raise OutputError(f"{self.shown}: exists and is not a directory")
        if self.manifest.exists():
            return
        strangers = [] if self.single_file else [p for p in folder.iterdir() if p != self.work]
        if self.work.exists():
            strangers += [p for p in self.work.iterdir() if not self._is_ours(p.name)]
        if strangers:
            raise OutputError(
                f"{folder}: holds {strangers[0].name}, which batchllm did not write;"
                " choose another output path"
            )

    def intact_answers(self, records: list[AnswersRecord]) -> list[AnswersRecord]:
        """Those whose file is there in full; the rest has to be done again."""
        return [r for r in records if _ANSWERS_NAME.fullmatch(r.file.name) and self.has(r.file)]

    def has(self, file: FileRecord) -> bool:
        """Whether a part or a file of answers is there in full."""
        folder = self.target if is_part_name(file.name) else self.work
        return _size(folder / file.name) == file.num_bytes

    def answers_path(self, number: int) -> Path:
        """Where a new file of answers goes."""
        return self.work / f"answers-{number:06d}.parquet"

    def clean(self, keep: set[str]) -> None:
        """Remove what a crash left: temporary files, and answers and parts not in `keep`."""
        for path in self.work.iterdir():
            if path.name.endswith(".tmp") and path.is_dir():
                shutil.rmtree(path)
            elif path.name.endswith(".tmp") or _is_answers(path.name, keep):
                path.unlink()
        for path in [] if self.single_file else list(self.target.iterdir()):
            if is_part_name(path.name) and path.name not in keep:
                path.unlink()
        self.summary.unlink(missing_ok=True)

    def _is_ours(self, name: str) -> bool:
        own = {path.name for path in (self.lock, self.manifest, self.summary)}
        own |= {path.name for path in self.only_while_unfinished}
        return name in own or name.endswith(".tmp") or _is_answers(name, set())


def _is_answers(name: str, but: set[str]) -> bool:
    return _ANSWERS_NAME.fullmatch(name) is not None and name not in but


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
