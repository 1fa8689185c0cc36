"""All runs so far, in a JSON file that is written after every one, so that a ladder can go on.

The unit is a cell: one workload in one round. Its engines are neighbours in time, which is what
makes their ratio worth something, so a cell that was cut off is run again as a whole.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from bench_engines.contract import EngineReport
from bench_engines.engines import BenchError
from bench_engines.results import Run


class Ledger:
    """The runs, and where they are kept; `path` None keeps them in memory.

    `machine` says on what they were measured; runs of two machines do not mix.
    """

    def __init__(self, path: Path | None, machine: dict[str, str | int]) -> None:
        self.path = path
        self.machine = machine
        self.runs: list[Run] = []

    @classmethod
    def open(cls, path: Path | None, machine: dict[str, str | int], *, resume: bool) -> "Ledger":
        """Starts a ledger, or goes on with the one in `path`.

        Raises:
            BenchError: `path` holds runs and `resume` does not say to go on; or they are another
                machine's, or cannot be read.
        """
        ledger = cls(path, machine)
        if path is None or not path.exists():
            return ledger
        if not resume:
            raise BenchError(f"{path} is there already; --resume goes on with it, or remove it")
        try:
            document = json.loads(path.read_text())
            ledger.runs = [_run(fields) for fields in document["runs"]]
        except (ValueError, KeyError, TypeError) as error:
            raise BenchError(f"{path} is no ladder's JSON: {error!r}") from None
        if document["machine"] != machine:
            raise BenchError(f"{path} is of another machine: {document['machine']}, not {machine}")
        return ledger

    def has_cell(self, workload: str, number: int, engines: Iterable[str]) -> bool:
        """Whether every one of `engines` has run on the workload in this round."""
        ran = {r.report.engine for r in self.runs if (r.workload, r.round) == (workload, number)}
        return ran.issuperset(engines)

    def add(self, run: Run) -> None:
        """Takes one more run, and writes them all."""
        self.runs.append(run)
        self._write()

    def drop(self, workload: str, number: int, engines: Iterable[str]) -> None:
        """Forgets what these engines did in a cell that is about to be run again."""
        dropped = {(workload, number, engine) for engine in engines}
        self.runs = [
            run for run in self.runs if (run.workload, run.round, run.report.engine) not in dropped
        ]

    def check_size(self, workload: str, *, rows: int, prompt_tokens: int) -> None:
        """Fails where earlier runs of the workload were of another size.

        Raises:
            BenchError: they were.
        """
        for run in self.runs:
            size = (run.report.rows, run.report.prompt_tokens)
            if run.workload == workload and size != (rows, prompt_tokens):
                raise BenchError(
                    f"{self.path} has runs of a {workload} of {size[0]:,} rows and {size[1]:,} "
                    f"tokens, which now has {rows:,} and {prompt_tokens:,}; start another file"
                )

    def _write(self) -> None:
        if self.path is None:
            return
        document = {"machine": self.machine, "runs": [asdict(run) for run in self.runs]}
        unfinished = self.path.with_name(self.path.name + ".tmp")
        unfinished.write_text(json.dumps(document, indent=1) + "\n")
        unfinished.replace(self.path)


def _run(fields: dict[str, object]) -> Run:
    report = fields.pop("report")
    assert isinstance(report, dict)
    return Run(**fields, report=EngineReport(**report))  # type: ignore[arg-type]
