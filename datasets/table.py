"""The `table` workload: a relational table whose columns depend on each other.

After the tables of "Optimizing LLM Queries in Relational Workloads" (arXiv 2403.05821): reviews of
movies or of products, joined with what is known of each. `movie_id` determines title, genres,
director and a long text; the critic's name determines the publisher. Some movies and critics are
far more frequent than others, as by Zipf's law. Rows are shuffled and the columns stand in an
unhelpful order, the id and the review first: which order saves most is the engine's job, or the
user's. All words are drawn from a fixed list.

    python datasets/table.py out.parquet --rows 10000 --kind movies
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from describe_text import describe, render, saved
from numpy.typing import NDArray

WORD_LIST = (
    "about above after again air along also always animal answer around ask away back because "
    "before begin below between big book both boy bring build came car carry change children city "
    "close come country cut day different does down earth eat end enough even every example eye "
    "face family far father feet few find first follow food found four girl give good great group "
    "grow half hand hard head hear help high home house idea important keep kind land large last "
    "late learn leave left letter life light line list little live long look made make man many "
    "mean men might mile miss more most mother mountain move much music must name near need never "
    "new next night number often oil old once open other over own page paper part people picture "
    "place plant play point press quick read real right river run same saw say school sea second "
    "seem sentence set should show side small song soon sound spell stand start state still stop "
    "story study such take talk tell thing think thought through time together took tree try turn "
    "under until usual very walk want watch water way white while without word work world write "
    "year young"
)
WORDS = WORD_LIST.split()
FIRST_NAMES = ("Ada", "Bela", "Carl", "Dora", "Emil", "Faye", "Gert", "Hana", "Igor", "Jana")
GENRES = ("Action", "Animation", "Comedy", "Crime", "Drama", "Fantasy", "History", "Romance")
CATEGORIES = ("Audio", "Books", "Garden", "Kitchen", "Lighting", "Office", "Pets", "Sports", "Toys")

Maker = Callable[[np.random.Generator], str]


def text(low: int, high: int) -> Maker:
    """Makes sentences, `low` to `high` words in all."""

    def make(rng: np.random.Generator) -> str:
        words = [WORDS[i] for i in rng.integers(len(WORDS), size=rng.integers(low, high + 1))]
        lines = [" ".join(words[i : i + 12]).capitalize() for i in range(0, len(words), 12)]
        return ". ".join(lines) + "."

    return make


def title(rng: np.random.Generator) -> str:
    """Makes two to four capitalized words."""
    return " ".join(
        WORDS[i].capitalize() for i in rng.integers(len(WORDS), size=rng.integers(2, 5))
    )


def person(rng: np.random.Generator) -> str:
    """Makes a first and a last name."""
    first, last = FIRST_NAMES[rng.integers(len(FIRST_NAMES))], WORDS[rng.integers(len(WORDS))]
    return f"{first} {last.capitalize()}son"


def some_of(choices: tuple[str, ...], most: int) -> Maker:
    """Makes a list of one to `most` of the choices."""

    def make(rng: np.random.Generator) -> str:
        count = rng.integers(1, most + 1)
        return ", ".join(sorted(choices[i] for i in rng.permutation(len(choices))[:count]))

    return make


def date(rng: np.random.Generator) -> str:
    """Makes a day of some year."""
    year, month, day = rng.integers(1998, 2024), rng.integers(1, 13), rng.integers(1, 29)
    return f"{year}-{month:02}-{day:02}"


def stars(rng: np.random.Generator) -> str:
    """Makes a rating."""
    return f"{rng.integers(1, 6)}/5"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of table: what the columns hold and what depends on what.

    `item_id` determines the columns of `item`; the first column of `author` determines its others;
    those of `own` differ from row to row. `columns` is the order in the table.
    """

    question: str
    max_tokens: int
    item_id: str
    item: dict[str, Maker]
    author: dict[str, Maker]
    own: dict[str, Maker]
    columns: tuple[str, ...]

    @property
    def grouped(self) -> tuple[str, ...]:
        """The columns in an order that shares: the item's, then the author's, then the row's."""
        return (*self.item, self.item_id, *reversed(self.author), *self.own)


KINDS = {
    "movies": Kind(
        question="Is this movie suitable for children? Answer only yes or no.",
        max_tokens=4,
        item_id="movie_id",
        item={
            "movie_info": text(60, 120),
            "movie_title": title,
            "genres": some_of(GENRES, 3),
            "director": person,
        },
        author={"critic_name": person, "publisher": title},
        own={"review_date": date, "review_text": text(15, 40)},
        columns=(
            *("movie_id", "review_text", "review_date", "critic_name", "publisher"),
            *("director", "genres", "movie_title", "movie_info"),
        ),
    ),
    "products": Kind(
        question="Say in one sentence whether the review fits the description of the product.",
        max_tokens=48,
        item_id="product_id",
        item={
            "description": text(60, 120),
            "product_title": title,
            "category": some_of(CATEGORIES, 1),
            "brand": person,
        },
        author={"reviewer_name": person, "reviewer_city": title},
        own={"rating": stars, "review_date": date, "review_text": text(20, 60)},
        columns=(
            *("product_id", "review_text", "rating", "review_date", "reviewer_name"),
            *("reviewer_city", "brand", "category", "product_title", "description"),
        ),
    ),
}


def template(kind: Kind, columns: tuple[str, ...]) -> str:
    """A prompt template: the question, then one line for each column in the given order."""
    return "\n".join([kind.question, *(f"{name}: {{{{ {name} }}}}" for name in columns)])


def popular(count: int, rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draws one of `count` for each row, the k-th as often as 1/k says."""
    weights = 1 / np.arange(1, count + 1)
    return rng.choice(count, size=rows, p=weights / weights.sum())


def distinct(make: Maker, count: int, rng: np.random.Generator) -> list[str]:
    """Makes values of which no two are equal, so that they may determine others."""
    found: dict[str, None] = {}
    for number in range(count):
        value = make(rng)
        found[f"{value} {number}" if value in found else value] = None
    return list(found)


def build(kind: Kind, *, rows: int = 10_000, seed: int = 0) -> pa.Table:
    """Makes the table, its rows in random order.

    Raises:
        ValueError: no rows are wanted.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1")
    rng = np.random.default_rng(seed)
    items, authors = max(1, rows // 20), max(1, rows // 40)
    item_of = rng.permutation(items)[popular(items, rows, rng)]
    author_of = rng.permutation(authors)[popular(authors, rows, rng)]
    values = {kind.item_id: [f"{kind.item_id[0]}/{item:06}" for item in item_of]}
    for name, make in kind.item.items():
        made = [make(rng) for _ in range(items)]
        values[name] = [made[item] for item in item_of]
    determining = next(iter(kind.author))
    for name, make in kind.author.items():
        # Several critics write for one publisher.
        made = distinct(make, authors if name == determining else max(1, authors // 4), rng)
        values[name] = [made[author % len(made)] for author in author_of]
    for name, make in kind.own.items():
        values[name] = [make(rng) for _ in range(rows)]
    table = pa.table({name: values[name] for name in kind.columns})
    return table.append_column("max_tokens", pa.array([kind.max_tokens] * rows, pa.int32()))


def main() -> None:
    """Command line: where to write, how many rows, and of what kind."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="Parquet file to write")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--kind", choices=sorted(KINDS), default="movies")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kind = KINDS[arguments.kind]
    try:
        table = build(kind, rows=arguments.rows, seed=arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    pq.write_table(table, arguments.out, compression="zstd")
    grouped = saved(render(table, template(kind, kind.grouped)))
    line = describe(table, template(kind, kind.columns))
    print(f"{arguments.out}: {line}; {grouped:.1%} with the columns {', '.join(kind.grouped)}")


if __name__ == "__main__":
    main()
