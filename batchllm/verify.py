"""Is an output what its job says it is: every row once, nothing damaged, nothing changed since."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchllm.errors import BatchLLMError, InputError, OutputError
from batchllm.io.answers import AnswerColumns
from batchllm.io.content import ContentHash
from batchllm.io.durable import one_line_reason
from batchllm.io.inspect import RunRecord, read_run
from batchllm.io.join import RowStream, read_answers
from batchllm.io.layout import OutputLayout
from batchllm.io.manifest import read_manifest
from batchllm.io.parquet import ParquetInput
from batchllm.io.parts import is_part_name
from batchllm.io.row_groups import ParquetReader

_MOST_SHOWN = 10


@dataclass(slots=True)
class Verdict:
    """What was looked at, in sentences: what is as it should be, what is not, what was left out."""

    fine: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.wrong

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "good": self.is_good,
            "fine": self.fine,
            "wrong": self.wrong,
            "unchecked": self.unchecked,
        }

    def as_text(self) -> str:
        """One line a sentence."""
        lines = [f"ok         {text}" for text in self.fine]
        lines += [f"unchecked  {text}" for text in self.unchecked]
        lines += [f"WRONG      {text}" for text in self.wrong[:_MOST_SHOWN]]
        if len(self.wrong) > _MOST_SHOWN:
            lines.append(f"WRONG      and {len(self.wrong) - _MOST_SHOWN:,} more")
        return "\n".join(lines)


def verify(output: str | Path, source: str | Path | None = None) -> Verdict:
    """Check the output at `output`, complete or not; reads all of it and changes nothing.

    Args:
        output: the output.
        source: the input; None for where it was when the job ran, if it is still there.

    Raises:
        OutputError: there is no output of ours, or its manifest cannot be read.
    """
    record = read_run(output)
    layout = OutputLayout.of(output)
    verdict = Verdict()
    try:
        if record.state == "unfinished":
            _check_unfinished(record, layout, verdict)
        elif _check_files(record, layout, verdict):
            _check_answers(record, layout, verdict)
            _check_input(record, layout, source, verdict)
    except InputError as error:  # of a file of the output: it says which, and what rows
        verdict.wrong.append(str(error))
    except OSError as error:
        raise OutputError(f"{output}: cannot be read: {one_line_reason(error)}") from error
    return verdict


def _check_unfinished(record: RunRecord, layout: OutputLayout, verdict: Verdict) -> None:
    """Files of answers: there, whole, every row once."""
    state = read_manifest(layout.manifest)
    assert state is not None, "an unfinished output has a manifest"
    if state.finished is not None:  # it was complete
        _check_parts(layout, verdict)
        return
    times = np.zeros(record.num_rows, dtype=np.int64)
    for answers in state.answers:
        if answers not in record.answers:
            verdict.wrong.append(
                f"{answers.file.name}: missing or not as it was written; "
                f"its {answers.num_rows:,} rows will be answered again"
            )
            continue
        index = np.concatenate(
            [
                np.zeros(0, np.int64),
                *(r.index for r in read_answers(layout.work / answers.file.name, pa.schema([]))),
            ]
        )
        if len(index) != answers.num_rows:
            verdict.wrong.append(
                f"{answers.file.name}: {len(index):,} rows, not {answers.num_rows:,}"
            )
        outside = (index < 0) | (index >= record.num_rows)
        if outside.any():
            verdict.wrong.append(f"{answers.file.name}: row {index[outside][0]} is not the input's")
        np.add.at(times, index[~outside], 1)
    for row in np.flatnonzero(times > 1)[:_MOST_SHOWN].tolist():
        verdict.wrong.append(f"row {row} is answered {times[row]} times")
    verdict.fine.append(f"manifest: {len(state.answers):,} files of answers, every line whole")
    verdict.unchecked.append(
        f"the job is unfinished: {record.num_finished_rows:,} of {record.num_rows:,} rows; "
        "the same command goes on"
    )


def _check_files(record: RunRecord, layout: OutputLayout, verdict: Verdict) -> bool:
    """Names, sizes, columns and numbers of rows; False where reading on makes no sense."""
    columns = dict(record.columns)
    num_rows = 0
    for path in _files(layout):
        with closing(ParquetReader(path)) as reader:
            footer = reader.footer
        found = {column.name: str(column.type) for column in footer.schema}
        if list(found.items()) != list(columns.items()):
            verdict.wrong.append(f"{path}: columns are {found}, the job's are {columns}")
        num_rows += sum(footer.group_rows)
    if not layout.single_file:
        _check_parts(layout, verdict)
    if num_rows != record.num_rows:
        verdict.wrong.append(f"{layout.shown}: {num_rows:,} rows, the job has {record.num_rows:,}")
    if verdict.is_good:
        verdict.fine.append(f"{num_rows:,} rows with the job's {len(columns)} columns")
    return verdict.is_good


def _check_parts(layout: OutputLayout, verdict: Verdict) -> None:
    state = read_manifest(layout.manifest)
    assert state is not None and state.finished is not None, "a complete directory has a manifest"
    listed = {part.name for part in state.finished.parts}
    for part in state.finished.parts:
        if not layout.has(part):
            verdict.wrong.append(f"{layout.target / part.name}: missing or of another size")
    for path in _files(layout):
        if path.name not in listed:
            verdict.wrong.append(f"{path}: is not on record")
    if verdict.is_good:
        verdict.fine.append(f"{len(listed):,} parts, as the manifest has them")


def _check_answers(record: RunRecord, layout: OutputLayout, verdict: Verdict) -> None:
    """Every page's checksum, the hash of all answers, and what each answer says about itself."""
    assert record.summary is not None, "a complete output has a summary"
    columns = AnswerColumns.of_output(list(record.columns), record.identity["output_column"])
    content = ContentHash(columns.schema)
    num_failed = at = 0
    for table in _tables(layout):
        content.update(table)
        failed = pc.is_valid(table[columns.error])
        for name, is_error in (
            (columns.answer, pc.is_null(table[columns.answer])),
            (columns.finish_reason, pc.equal(table[columns.finish_reason], "error")),
        ):
            odd = pc.fill_null(pc.not_equal(failed, is_error), True)
            if pc.any(odd).as_py():
                row = at + pc.index(odd, True).as_py()
                verdict.wrong.append(f"row {row}: {name} and {columns.error} do not fit")
        num_failed += pc.sum(failed).as_py() or 0
        at += table.num_rows
    verdict.fine.append(f"every page of {at:,} rows can be read and has its checksum")
    if content.hexdigest() != record.answers_sha256:
        verdict.wrong.append("the answers are not those that were written: their hash is another")
    else:
        verdict.fine.append(
            f"the answers are those that were written (sha256 {record.answers_sha256})"
        )
    if num_failed != record.summary["failed"]:
        verdict.wrong.append(
            f"{num_failed:,} rows failed, the summary has {record.summary['failed']:,}"
        )
    else:
        verdict.fine.append(
            f"{num_failed:,} rows have an error and no answer, all others an answer"
        )


def _check_input(
    record: RunRecord, layout: OutputLayout, source: str | Path | None, verdict: Verdict
) -> None:
    """The input is the one that was answered, and its columns are in the output row by row."""
    assert record.summary is not None
    path = source or record.summary["input"]
    try:
        table = ParquetInput(path)
        is_same = table.content_hash() == record.identity["input"]["sha256"]
    except BatchLLMError as error:
        if source is not None:
            verdict.wrong.append(str(error))
        else:
            verdict.unchecked.append(f"the input, which is not there any more ({error})")
        return
    if not is_same:
        verdict.wrong.append(f"{path}: is not the input that was answered: its hash is another")
        return
    names = table.schema.names
    stored = RowStream(_tables(layout))
    for rows in table.read(np.ones(record.num_rows, dtype=np.bool_)):
        ours = pa.concat_tables(list(stored.take(rows.table.num_rows)))
        for name in names:
            if not _same(rows.table[name], ours[name]):
                first = next(
                    i
                    for i in range(len(rows.index))
                    if not _same(rows.table[name][i : i + 1], ours[name][i : i + 1])
                )
                verdict.wrong.append(f"row {rows.index[first]}: {name} is not the input's")
                return
    verdict.fine.append(f"every row of {path} is there, once and in order, with its own values")


def _same(left: pa.ChunkedArray, right: pa.ChunkedArray) -> bool:
    # Arrow has NaN differ from itself; so do Python's, but not their text.
    return bool(left.equals(right)) or repr(left.to_pylist()) == repr(right.to_pylist())


def _files(layout: OutputLayout) -> list[Path]:
    if layout.single_file:
        return [layout.target]
    return sorted(path for path in layout.target.iterdir() if is_part_name(path.name))


def _tables(layout: OutputLayout) -> Iterator[pa.Table]:
    """All rows of a complete output, in order, a batch at a time."""
    at = 0
    for path in _files(layout):
        with closing(ParquetReader(path)) as reader:
            for group in range(len(reader.footer.group_rows)):
                for batch in reader.batches(group, at):
                    yield pa.Table.from_batches([batch])
                    at += batch.num_rows
