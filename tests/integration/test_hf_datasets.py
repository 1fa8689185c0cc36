"""`generate` for Hugging Face datasets: features, files, fingerprints and splits."""

from pathlib import Path

import datasets as hf
import pyarrow as pa
import pytest
from guides import run_guide
from reviews import OPTIONS, RESULTS, reviews

from batchllm import LLM, SamplingParams
from batchllm.datasets import generate
from batchllm.errors import UsageError
from batchllm.integrations.summary import Summary

ROWS = 1200


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """On disk, with features that must not be touched."""
    hf.disable_progress_bars()
    table = reviews(ROWS)
    features = hf.Features(
        {
            "id": hf.Value("int64"),
            "product": hf.Value("string"),
            "text": hf.Value("string"),
            "label": hf.ClassLabel(names=["bad", "good"]),
            "picture": hf.Image(),
            "error": hf.List(hf.Value("int16")),
        }
    )
    picture = {"bytes": b"not a picture", "path": ""}  # so nothing may look at it
    rows = {
        "label": [i % 2 for i in range(ROWS)],
        "picture": [picture] * ROWS,
        "error": [[i, i + 1] for i in range(ROWS)],
    }
    table = pa.table({**dict(zip(table.column_names, table.columns, strict=True)), **rows})
    path = tmp_path_factory.mktemp("datasets") / "reviews"
    hf.Dataset(table).cast(features).save_to_disk(path)
    return hf.load_from_disk(path)


@pytest.fixture(scope="module")
def answers():
    params = SamplingParams(max_tokens=OPTIONS["max_tokens"])
    table = LLM("fake").generate(reviews(ROWS), params, template=OPTIONS["template"])
    return table.select(RESULTS).rename_columns(["answer", *(f"answer_{n}" for n in RESULTS[1:])])


def columns(dataset, names):
    return dataset.with_format("arrow")[:].select(names).combine_chunks()


def test_answers_stand_beside_columns_that_were_not_touched(dataset, answers):
    summary = Summary()
    got = generate(dataset, summary=summary, **OPTIONS, window_rows=300)
    assert columns(got, answers.column_names).equals(answers.combine_chunks())
    assert summary.metrics.rows == ROWS and summary.metrics.windows > 3
    assert {name: got.features[name] for name in dataset.features} == dataset.features
    raw = [one.data.select(dataset.column_names).combine_chunks() for one in (dataset, got)]
    assert raw[0].equals(raw[1])
    files = [Path(file["filename"]) for file in got.cache_files]
    assert files[0] == Path(dataset.cache_files[0]["filename"])  # the columns are where they were
    assert len(files) == 2 and files[1].stat().st_size < 400_000


def test_what_was_answered_is_found_again(dataset):
    first, second, other = Summary(), Summary(), Summary()
    one = generate(dataset, summary=first, **OPTIONS, seed=1)
    two = generate(hf.load_from_disk(Path(dataset.cache_files[0]["filename"]).parent), **OPTIONS)
    again = generate(dataset, summary=second, **OPTIONS, seed=1)
    changed = generate(dataset, summary=other, **OPTIONS, seed=2)
    assert first.metrics.rows == other.metrics.rows == ROWS and second.metrics.rows == 0
    assert one._fingerprint == again._fingerprint
    different = {each._fingerprint for each in (dataset, one, two, changed)}
    assert len(different) == 4
    assert columns(one, ["answer"]).equals(columns(again, ["answer"]))


def test_splits_are_one_table(dataset):
    whole = generate(dataset, **OPTIONS, temperature=1.0)
    splits = hf.DatasetDict(
        train=dataset.select(range(700)).with_format("numpy"),
        none=dataset.select([]),
        test=dataset.select(range(700, ROWS)).with_format("arrow", columns=["id", "text"]),
    )
    summary = Summary()
    got = generate(splits, summary=summary, **OPTIONS, temperature=1.0)
    assert list(got) == ["train", "none", "test"] and summary.metrics.rows == ROWS
    assert [split.num_rows for split in got.values()] == [700, 0, 500]
    for name, begin, end in (("train", 0, 700), ("test", 700, ROWS)):
        want = columns(whole.select(range(begin, end)), ["id", "answer", "answer_error"])
        assert columns(got[name], ["id", "answer", "answer_error"]).equals(want)
    assert got["none"].features == got["train"].features == whole.features
    assert got["train"].format["type"] == "numpy" and got["test"].format["type"] == "arrow"
    shown = got["test"].format["columns"]
    assert "answer" in shown and "text" in shown and "label" not in shown


def test_a_shuffled_dataset_is_answered_in_its_order(dataset, answers):
    shuffled = dataset.shuffle(seed=3).select(range(300))
    got = generate(shuffled, **OPTIONS, window_rows=100)
    assert got["id"][:] == shuffled["id"][:]
    by_id = answers["answer"].to_pylist()
    assert got["answer"][:] == [by_id[i] for i in shuffled["id"][:]]
    assert generate(dataset.select(range(3)), model="fake", template="Hello")["answer"][:][2]


def test_what_cannot_be_answered_is_refused(dataset):
    with pytest.raises(UsageError, match="not IterableDataset: all rows are planned together"):
        generate(dataset.to_iterable_dataset(), **OPTIONS)
    with pytest.raises(UsageError, match="did you mean 'text'"):
        generate(dataset, model="fake", prompt_column="texts")
    other = dataset.remove_columns("error")
    with pytest.raises(UsageError, match="the splits have different columns"):
        generate(hf.DatasetDict(a=dataset, b=other), **OPTIONS)
    numbers = hf.Dataset.from_dict({"text": [1], "product": ["a"]})
    strings = hf.Dataset.from_dict({"text": ["a"], "product": ["a"]})
    with pytest.raises(UsageError, match="prompt columns are of different types"):
        generate(hf.DatasetDict(a=numbers, b=strings), **OPTIONS)


def test_the_guide_runs(tmp_path, monkeypatch):
    names = run_guide("DATASETS.md", tmp_path, monkeypatch)
    assert names["answered"].num_rows == 2000
