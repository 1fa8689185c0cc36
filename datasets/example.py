"""The example table shipped with the project: a document's sections, the same questions to each.

The text is the Constitution of the United States (public domain), as Debian's `miscfiles` package
installs it. Each section of some hundred words meets every question once, and the rows are
shuffled: the sharing that a review of contracts, tickets or papers has, without its privacy.

    apt-get install miscfiles
    python datasets/example.py /usr/share/state/us-constitution.gz datasets/example.parquet
"""

import argparse
import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FEWEST_WORDS = 140  # shorter sections are put together with the next
MOST_WORDS = 350  # longer ones are cut between paragraphs

QUESTIONS = (
    "What is this text about? Answer in one sentence.",
    "Rewrite this text in simple modern English, in two or three sentences.",
    "List the people, offices and bodies that this text names.",
    "Does this text give a power to the Congress? Answer yes or no, and say why.",
    "Does this text name a number of years, or an age? Answer yes or no, and quote it.",
    "What does this text forbid? Answer in one sentence.",
    "Who must act under this text, and what must they do? Answer in one sentence.",
    "Write a title of at most six words for this text.",
    "Which one fits this text best: legislature, executive, judiciary, states, elections or "
    "rights? Answer with one word.",
)

SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("document", "section", "text")]
    + [pa.field("question", pa.string(), nullable=False)],
    metadata={
        "title": "The Constitution of the United States, section by section, with questions",
        "source": "us-constitution of the Debian package miscfiles, 1.5+dfsg-4",
        "license": "text: public domain; questions and table: Apache-2.0, as the project",
        "builder": "datasets/example.py",
    },
)


@dataclass(frozen=True, slots=True)
class Section:
    """A piece of the document under one heading; `first` and `last` tell what it spans."""

    document: str
    first: str
    last: str
    paragraphs: tuple[str, ...]

    @property
    def words(self) -> int:
        return sum(len(paragraph.split()) for paragraph in self.paragraphs)

    @property
    def label(self) -> str:
        return self.first if self.first == self.last else f"{self.first} to {self.last}"

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)


def read_sections(path: Path) -> Iterator[Section]:
    """Yields the document's own sections in order, each paragraph unwrapped to one line.

    An article's sections stand alone; an amendment, mostly short, stays whole.
    """
    document, article, heading = "Articles", "", ""
    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", gzip.decompress(path.read_bytes()).decode("ascii")):
        paragraph = " ".join(block.split())
        is_article = re.fullmatch(r"Preamble|Amendments|(Article|Amendment) [IVX]+", paragraph)
        is_section = re.fullmatch(r"Section \d+", paragraph) and document == "Articles"
        if not is_article and not is_section:
            paragraphs.append(paragraph)
            continue
        # What stands above the preamble is the title, under "Amendments" a note on the first ten.
        if paragraphs and heading not in ("", "Amendments"):
            yield Section(document, heading, heading, tuple(paragraphs))
        paragraphs = []
        article = article if is_section else paragraph
        heading = f"{article}, {paragraph}" if is_section else paragraph
        if heading == "Amendment I":
            document = "Bill of Rights"
        elif heading == "Amendment XI":
            document = "Later Amendments"
    yield Section(document, heading, heading, tuple(paragraphs))


def cut(section: Section) -> Iterator[Section]:
    """Cuts a long section between paragraphs into parts of about equal size."""
    parts = -(-section.words // MOST_WORDS)
    if parts == 1:
        yield section
        return
    target = section.words / parts
    pieces: list[list[str]] = [[]]
    done = 0
    for paragraph in section.paragraphs:
        if pieces[-1] and done >= target * len(pieces):
            pieces.append([])
        pieces[-1].append(paragraph)
        done += len(paragraph.split())
    for number, piece in enumerate(pieces, start=1):
        label = section.first + (f" (part {number})" if len(pieces) > 1 else "")
        yield Section(section.document, label, label, tuple(piece))


def join(sections: Iterator[Section]) -> list[Section]:
    """Puts short neighbours of one document together, so that every text says enough to ask of."""
    joined: list[Section] = []
    for section in sections:
        headed = replace(section, paragraphs=(section.label, *section.paragraphs))
        before = joined[-1] if joined else None
        short = before is not None and min(before.words, headed.words) < FEWEST_WORDS
        if before is not None and short and before.document == headed.document:
            together = replace(
                before, last=headed.last, paragraphs=(*before.paragraphs, *headed.paragraphs)
            )
            if together.words <= MOST_WORDS:
                joined[-1] = together
                continue
        joined.append(headed)
    return joined


def build(path: Path, seed: int) -> pa.Table:
    """Makes the table: every question to every section, shuffled."""
    sections = join(part for section in read_sections(path) for part in cut(section))
    rows = [(s.document, s.label, s.text, question) for s in sections for question in QUESTIONS]
    order = np.random.default_rng(seed).permutation(len(rows))
    columns = [pa.array(column) for column in zip(*(rows[i] for i in order), strict=True)]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def main() -> None:
    """Command line: the text, and where to write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path, help="us-constitution.gz of Debian's miscfiles")
    parser.add_argument("out", type=Path, help="Parquet file to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = build(arguments.text, arguments.seed)
    pq.write_table(table, arguments.out, compression="zstd")
    sections = len(set(table["section"].to_pylist()))
    print(
        f"{arguments.out}: {len(table)} rows, {sections} sections, {len(QUESTIONS)} questions each"
    )


if __name__ == "__main__":
    main()
