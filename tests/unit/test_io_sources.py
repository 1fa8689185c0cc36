"""Which files an INPUT means, in which order, and which OUTPUT may go with it."""

import os

import pytest

from batchllm.errors import InputError, UsageError
from batchllm.io.sources import SourceFile, check_paths, find_files


def touch(root, *names, content=b"PAR1"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def names(source):
    return [file.name for file in find_files(source)]


def test_a_directory_is_searched_in_path_order_without_hidden_names(tmp_path):
    touch(tmp_path, "b.parquet", "a/2.pq", "a/1.parquet", "a-x/0.parquet")
    touch(tmp_path, "_SUCCESS", ".hidden.parquet", "_tmp/x.parquet", ".git/y.parquet", "a/_z.pq")
    assert names(tmp_path) == ["a-x/0.parquet", "a/1.parquet", "a/2.pq", "b.parquet"]


def test_a_file_without_a_suffix_counts_when_its_bytes_are_parquet(tmp_path):
    touch(tmp_path, "part-0", "a.parquet")
    touch(tmp_path, "README.md", "empty", content=b"")
    os.mkfifo(tmp_path / "pipe")  # opening it would hang
    assert names(tmp_path) == ["a.parquet", "part-0"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "data/a.parquet", "elsewhere/b.parquet")
    (tmp_path / "data/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/side").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path / "data") == ["a.parquet", "side/b.parquet"]


def test_a_dangling_link_is_listed_rather_than_its_rows_silently_lost(tmp_path):
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "nowhere")
    assert names(tmp_path) == ["gone.parquet"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.parquet", ["x.parquet", "y.parquet"]),
        ("[y]*", ["y.parquet"]),
        ("*/x.parquet", ["k=1/x.parquet", "k=2/x.parquet"]),
        ("**/*.parquet", ["k=1/x.parquet", "k=2/x.parquet", "x.parquet", "y.parquet"]),
        ("k=*", ["k=1/x.parquet", "k=2/x.parquet"]),
        ("k=1/*", ["x.parquet"]),
        ("_k/*", ["z.parquet"]),
    ],
)
def test_a_glob_numbers_its_files_below_its_fixed_part(tmp_path, pattern, found):
    touch(tmp_path, "x.parquet", "y.parquet", "k=1/x.parquet", "k=2/x.parquet", "_k/z.parquet")
    assert names(tmp_path / pattern) == found


def test_a_path_that_exists_is_no_pattern(tmp_path):
    touch(tmp_path, "a[1].parquet", "a1.parquet")
    assert names(tmp_path / "a[1].parquet") == ["a[1].parquet"]


def test_hive_values_are_decoded():
    file = SourceFile(None, "a=1/b=x%2Fy/c=__HIVE_DEFAULT_PARTITION__/=n/plain/d=p=q/f=0.parquet")
    assert file.hive_values == {"a": "1", "b": "x/y", "c": None, "d": "p=q"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no such file or directory"),
        ("*.nothing", "the pattern matches no Parquet file"),
        ("empty", "the directory holds no Parquet file"),
        ("pipe", "not a regular file"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=message) as caught:
        find_files(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "sub/a.parquet")

    def scandir(path):
        raise PermissionError(13, "no", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match="cannot be listed: Permission denied"):
        find_files(tmp_path)


OVERLAPS = [
    ("in.parquet", "in.parquet"),
    ("in.parquet", "./sub/../in.parquet"),
    ("in.parquet", "link.parquet"),
    ("in.parquet", "hard.parquet"),
    ("data", "data"),
    ("data", "data/out.parquet"),
    ("data", "data/deep/er/out"),
    ("data/a.parquet", "data"),
    ("data", "."),
    ("data/*.parquet", "data/out.parquet"),
    ("data/*", "data/out"),
    ("data/*/*.parquet", "data/out"),
    ("data/*", "data/k=1/out.parquet"),
    ("data/**/*.parquet", "data/x/y/out.parquet"),
    ("data/**/*.parquet", "data/out"),
    ("data/*.parquet", "data"),
]
APART = [
    ("in.parquet", "out.parquet"),
    ("data", "data.parquet"),
    ("data", "data2"),
    ("data/*.parquet", "data/out"),
    ("data/*.parquet", "data/sub/out.parquet"),
    ("data/in-*.parquet", "data/out.parquet"),
    ("data/**/in-*.parquet", "data/out.parquet"),
]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    touch(tmp_path, "in.parquet", "data/a.parquet", "data/k=1/b.parquet")
    (tmp_path / "link.parquet").symlink_to("in.parquet")
    (tmp_path / "hard.parquet").hardlink_to(tmp_path / "in.parquet")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(("source", "output"), OVERLAPS)
def test_an_output_that_the_input_reaches_is_refused(tree, source, output, absolute):
    with pytest.raises(UsageError, match="overlap"):
        check_paths(tree / source if absolute else source, output)


@pytest.mark.parametrize(("source", "output"), APART)
def test_an_output_apart_from_the_input_is_fine(tree, source, output):
    check_paths(source, output)
    check_paths(tree / source, tree / output)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_names_that_no_file_can_have(tmp_path, name):
    for source, output in ((name, "out"), (str(tmp_path), name)):
        with pytest.raises(UsageError, match="cannot be a file's name"):
            check_paths(source, output)
    with pytest.raises(InputError):
        find_files(name)
