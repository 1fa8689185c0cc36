"""The `documents` workload: many questions to every section of every chapter of some documents.

A deep tree: the head of the document, then a chapter, then the section that the question is about,
then the question. The texts are public domain and come from Debian packages; give the files of at
least one:

    apt-get install bible-kjv bible-kjv-text jargon-text miscfiles
    bible -l9999 'Gen1:1-Rev22:21' </dev/null > kjv.txt
    python datasets/documents.py out.parquet --bible kjv.txt \
        --jargon /usr/share/doc/jargon-text/jargon.txt.gz \
        --constitution /usr/share/state/us-constitution.gz
"""

import argparse
import gzip
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from describe_text import describe, shuffle, table_of

# Sizes in characters. A chapter that is longer is cut into parts, which then count as chapters.
HEAD, CHAPTER, SECTION, SHORTEST_CHAPTER = 1200, 5000, 800, 1600

TEMPLATE = (
    "{{ doc_head }}\n\n{{ chapter_text }}\n\nOne passage of it:\n{{ section_text }}\n\n"
    "{{ question }}"
)

# Each with the most tokens its answer may have.
QUESTIONS = (
    ("What is this passage about? Answer in one sentence.", 48),
    ("Who is named in this passage? Give a list.", 64),
    ("Retell this passage in modern English, in two or three sentences.", 128),
    ("Does this passage name a number? Answer yes or no.", 4),
    ("Write a title of at most six words for this passage.", 16),
    ("Is this passage a story, a rule, a speech or a description? Answer with one word.", 4),
)

TEXTS = ("document", "chapter", "doc_head", "chapter_text", "section_text", "question")
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string(), nullable=False) for name in TEXTS),
        pa.field("max_tokens", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Chapter:
    """A chapter, or a part of a long one, and the document it is of."""

    document: str
    title: str
    paragraphs: tuple[str, ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.paragraphs))


def read_text(path: Path) -> str:
    """The text of a file, which may be compressed with gzip."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def read_bible(text: str) -> Iterator[Chapter]:
    """Yields the chapters of `bible -l9999`: a line that names book and chapter, then verses."""
    for block in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        title, *lines = block.strip().split("\n")
        verses = tuple(line.strip() for line in lines if line.strip())
        if verses:
            yield Chapter(title.rpartition(" ")[0], title, verses)


def read_headed(
    text: str, document: str, heading: re.Pattern[str], kept: re.Pattern[str]
) -> Iterator[Chapter]:
    """Yields the chapters below those paragraphs that match `heading`, if they match `kept` too.

    Each paragraph is unwrapped to one line; drawings of tables are left out.
    """
    title, paragraphs = "", list[str]()
    for block in [*re.split(r"\n\s*\n", text), None]:
        paragraph = " ".join(block.split()) if block is not None else ""
        if block is not None and not heading.fullmatch(paragraph):
            if paragraph and not re.search("[─│═]", paragraph):
                paragraphs.append(paragraph)
            continue
        if kept.fullmatch(title) and paragraphs:
            yield Chapter(document, title, tuple(paragraphs))
        title, paragraphs = paragraph, []


def read_jargon(text: str) -> Iterator[Chapter]:
    """Yields the chapters of the Jargon File around its lexicon, which is no running text."""
    kept = r"(Chapter \d+|Appendix [A-Z])\. .+"
    heading = re.compile(kept + r"|Part I+\. .+|Bibliography")
    return read_headed(text, "The Jargon File", heading, re.compile(kept))


def read_constitution(text: str) -> Iterator[Chapter]:
    """Yields the articles of the Constitution of the United States, and the longer amendments."""
    kept = r"(Article|Amendment) [IVX]+"
    heading = re.compile(kept + "|Preamble|Amendments")
    return read_headed(text, "The Constitution", heading, re.compile(kept))


READERS: dict[str, Callable[[str], Iterator[Chapter]]] = {
    "bible": read_bible,
    "jargon": read_jargon,
    "constitution": read_constitution,
}


def split(paragraphs: tuple[str, ...], size: int) -> Iterator[tuple[str, ...]]:
    """Cuts between paragraphs into parts of about equal length, close to `size` characters."""
    total = sum(map(len, paragraphs))
    target = total / max(1, round(total / size))
    part: list[str] = []
    parts = done = 0
    for paragraph in paragraphs:
        if done >= target * (parts + 1):
            yield tuple(part)
            part, parts = [], parts + 1
        part.append(paragraph)
        done += len(paragraph)
    yield tuple(part)


def cut_chapters(chapters: list[Chapter]) -> list[Chapter]:
    """Cuts long chapters into parts and leaves out short ones."""
    cut = []
    for chapter in chapters:
        parts = list(split(chapter.paragraphs, CHAPTER))
        for number, part in enumerate(parts, start=1):
            title = chapter.title + (f" (part {number})" if len(parts) > 1 else "")
            cut.append(Chapter(chapter.document, title, part))
    return [chapter for chapter in cut if chapter.size >= SHORTEST_CHAPTER]


def head_of(document: str, chapters: list[Chapter]) -> str:
    """What is said first of a document: its name, and how it begins."""
    beginning = next(split(chapters[0].paragraphs, HEAD))
    return "\n".join([f"{document}. It begins:", *beginning])


def choose(chapters: list[Chapter], most: int, rng: np.random.Generator) -> list[Chapter]:
    """At most `most` chapters, in their order; all of them where `most` is 0."""
    if not most or len(chapters) <= most:
        return chapters
    return [chapters[i] for i in sorted(rng.permutation(len(chapters))[:most].tolist())]


def rows_of(head: str, chapter: Chapter) -> Iterator[tuple[str | int, ...]]:
    """Yields the rows of one chapter: every question to every section."""
    whole = "\n".join([f"{chapter.title}:", *chapter.paragraphs])
    for section in split(chapter.paragraphs, SECTION):
        for question, most in QUESTIONS:
            yield chapter.document, chapter.title, head, whole, "\n".join(section), question, most


def build(chapters: list[Chapter], *, most: int = 2, seed: int = 0) -> pa.Table:
    """Makes the table from at most `most` chapters a document, shuffled."""
    rng = np.random.default_rng(seed)
    documents: dict[str, list[Chapter]] = {}
    for chapter in chapters:
        documents.setdefault(chapter.document, []).append(chapter)
    rows = [
        row
        for document, own in documents.items()
        for chapter in choose(cut_chapters(own), most, rng)
        for row in rows_of(head_of(document, own), chapter)
    ]
    return shuffle(table_of(rows, SCHEMA), seed)


def main() -> None:
    """Command line: where to write, and the texts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="Parquet file to write")
    parser.add_argument("--bible", type=Path, help="what `bible -l9999` of bible-kjv prints")
    parser.add_argument("--jargon", type=Path, help="jargon.txt.gz of jargon-text")
    parser.add_argument("--constitution", type=Path, help="us-constitution.gz of miscfiles")
    parser.add_argument("--chapters", type=int, default=2, help="of each document; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        chapters = [
            chapter
            for name, read in READERS.items()
            if (path := getattr(arguments, name))
            for chapter in read(read_text(path))
        ]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not chapters:
        parser.error("no chapters; give at least one of --bible, --jargon, --constitution")
    table = build(chapters, most=arguments.chapters, seed=arguments.seed)
    pq.write_table(table, arguments.out, compression="zstd")
    print(f"{arguments.out}: {describe(table, TEMPLATE)}")


if __name__ == "__main__":
    main()
