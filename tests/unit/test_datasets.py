"""The builders of workloads: what they promise of their tables, on tiny inputs."""

import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# datasets/ is no package: it would shadow the library of that name.
DATASETS = str(Path(__file__).parents[2] / "datasets")
sys.path.insert(0, DATASETS)
try:
    import blend
    import describe_text
    import documents
    import fewshot
    import lengths
    import micro
    import table
    import tools
    import tree
finally:
    sys.path.remove(DATASETS)


def token_rows(built):
    return [row.values.to_numpy() for row in built["token_ids"]]


def count_in_a_trie(sequences):
    return len({tuple(s[:end]) for s in sequences for end in range(1, len(s) + 1)})


@settings(max_examples=60)
@given(st.lists(st.text(alphabet="aé\U0001f600\ufb01", max_size=6), max_size=12))
def test_distinct_prefixes_of_text_are_the_nodes_of_a_trie(prompts):
    assert describe_text.count_distinct_prefixes(prompts) == count_in_a_trie(prompts)


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=12))
def test_distinct_prefixes_of_tokens_are_the_nodes_of_a_trie(rows):
    arrays = [np.array(row, dtype=np.int32) for row in rows]
    assert micro.count_distinct_prefixes(arrays) == count_in_a_trie(rows)


def test_description_counts_characters_and_output():
    built = describe_text.table_of(
        [("aé", 3), ("ab", 4)],
        pa.schema([("text", pa.string()), ("max_tokens", pa.int32())]),
    )
    line = describe_text.describe(built, ">{{ text }}")
    assert line == (
        "2 rows, 6 prompt characters, 4 after sharing (33.3% saved), at most 7 output tokens"
    )


def test_tree_has_the_tokens_of_its_nodes():
    built = tree.build([1, 2, 6], [5, 3, 2], output=4)
    assert micro.count_distinct_prefixes(token_rows(built)) == 1 * 5 + 2 * 3 + 6 * 2
    assert {len(row) for row in token_rows(built)} == {10}
    assert built["max_tokens"].to_pylist() == [4] * 6
    assert built.equals(tree.build([1, 2, 6], [5, 3, 2], output=4))


@pytest.mark.parametrize("nodes, tokens", [([], []), ([2, 1], [3, 3]), ([1], [0]), ([1, 2], [3])])
def test_tree_refuses_what_is_no_tree(nodes, tokens):
    with pytest.raises(ValueError, match="node counts"):
        tree.build(nodes, tokens)


@pytest.mark.parametrize("sharing", [0.05, 0.35, 0.85])
def test_lengths_shares_what_was_asked_for(sharing):
    rows = token_rows(lengths.build("sharegpt", sharing=sharing, rows=320))
    saved = 1 - micro.count_distinct_prefixes(rows) / sum(map(len, rows))
    assert saved == pytest.approx(sharing, abs=0.02)


def test_lengths_without_sharing_are_those_of_the_trace():
    built = lengths.build("lmsys", rows=50)
    trace = pq.read_table(lengths.TRACES / "lmsys.parquet").slice(0, 50)
    prompts = trace["prompt_tokens"].to_pylist()
    assert sorted(map(len, token_rows(built))) == sorted(max(1, n) for n in prompts)


@pytest.mark.parametrize("trace, sharing", [("none", 0.1), ("lmsys", 0.95), ("lmsys", -0.1)])
def test_lengths_refuses_what_cannot_be(trace, sharing):
    with pytest.raises(ValueError, match=r"no trace named|sharing is"):
        lengths.build(trace, sharing=sharing, rows=32)


def test_blend_shares_heads_only_where_the_mix_says_so():
    saved = {}
    for shared in (True, False):
        rows = token_rows(blend.build(blend.Mix(114, 10, 3, shared)))
        assert len(rows) == 127
        saved[shared] = sum(map(len, rows)) - micro.count_distinct_prefixes(rows)
    # 114 rows of 57 subjects: one of each pair of heads is saved, and by chance a token or so.
    assert saved[True] == pytest.approx(57 * blend.HEAD_TOKENS, abs=20)
    assert saved[False] < 20


@pytest.mark.parametrize("kind", table.KINDS.values(), ids=table.KINDS)
def test_dependencies_hold_in_the_table(kind):
    built = table.build(kind, rows=400)
    rows = built.to_pylist()
    assert tuple(built.schema.names) == (*kind.columns, "max_tokens")
    assert sorted(kind.columns) == sorted(kind.grouped)
    author, *of_author = kind.author
    for determining, determined in ((kind.item_id, kind.item), (author, of_author)):
        values = {row[determining] for row in rows}
        assert 1 < len(values) < len(rows)
        for name in determined:
            assert len({(row[determining], row[name]) for row in rows}) == len(values)


def test_table_repeats_items_and_is_the_same_again():
    kind = table.KINDS["movies"]
    built = table.build(kind, rows=400)
    assert built.equals(table.build(kind, rows=400))
    assert not built.equals(table.build(kind, rows=400, seed=1))
    counts = sorted(built["movie_id"].value_counts().field("counts").to_pylist())
    assert counts[-1] > 5 * counts[len(counts) // 2]
    words = [len(text.split()) for text in built["movie_info"].to_pylist()]
    assert 60 <= min(words) <= max(words) <= 120


def test_reordered_columns_share_more():
    kind = table.KINDS["movies"]
    built = table.build(kind, rows=400)
    stored, grouped = (
        describe_text.saved(describe_text.render(built, table.template(kind, columns)))
        for columns in (kind.columns, kind.grouped)
    )
    assert stored < 0.2 < 0.5 < grouped


def entry(name, *messages):
    function = [{"name": name, "description": "Grüße"}]
    question = [[{"role": role, "content": content} for role, content in messages]]
    return {"id": f"{name}-{len(messages)}", "function": function, "question": question}


def test_tools_reads_a_set_and_puts_a_conversation_into_one_text(tmp_path):
    entries = [entry("f", ("user", "a?")), entry("f", ("system", "s"), ("user", "b?"))]
    wheel = tmp_path / "bfcl_eval.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        lines = "\n".join(json.dumps(e) for e in entries) + "\n"
        archive.writestr("bfcl_eval/data/BFCL_v9_live_multiple.json", lines)
        archive.writestr("bfcl_eval/data/BFCL_v9_multiple.json", json.dumps(entries[0]))
    built = tools.build(tools.read_set(wheel, "live_multiple"), max_tokens=5)
    assert sorted(built["question"].to_pylist()) == ["a?", "system: s\n\nuser: b?"]
    assert set(built["functions"].to_pylist()) == {
        json.dumps(entries[0]["function"], ensure_ascii=False)
    }
    assert built["max_tokens"].to_pylist() == [5, 5]
    assert tools.read_set(wheel, "multiple") == entries[:1]
    with pytest.raises(ValueError, match="0 sets named 'simple_java'"):
        tools.read_set(wheel, "simple_java")


TASK = """
task: {task}
description: "About {task}.\\n\\n"
fewshot_config:
  samples:
  - question: "{task} one? "
    target: It is 1.
  - question: {task} two?
    target: It is 2.
"""


def test_fewshot_asks_a_head_what_only_others_answer(tmp_path):
    wheel = tmp_path / "lm_eval.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, task in (("x", "x"), ("y", "y"), ("z", "z"), ("z_again", "z")):
            path = f"lm_eval/tasks/mmlu/flan_cot_fewshot/mmlu_{file}.yaml"
            archive.writestr(path, TASK.format(task=task))
    family = fewshot.FAMILIES["mmlu"]
    tasks = fewshot.read_tasks(wheel, family)
    assert [task.name for task in tasks] == ["x", "y", "z"]
    assert tasks[0].head(family.answer) == (
        "About x.\n\nQ: x one?\nA: It is 1.\n\nQ: x two?\nA: It is 2."
    )
    built = fewshot.build([(family, tasks)], count=9)
    assert built.equals(fewshot.build([(family, tasks)], count=9))
    assert len(fewshot.build([(family, tasks)], count=3)) == 3 * 3
    assert len(built) == len(set(zip(built["head"], built["question"], strict=True))) == 3 * 4
    for row in built.to_pylist():
        asked = row["question"].removeprefix("Q: ").removesuffix(family.ask)
        assert asked not in row["head"]
        assert any(asked in task.questions for task in tasks)
    with pytest.raises(ValueError, match="is it lm-eval's wheel"):
        fewshot.read_tasks(wheel, fewshot.FAMILIES["bbh"])


def test_other_numbers_keep_their_form():
    text = "Two of 15 cars cost $2407 or 3."
    form = re.compile(r"[A-Z][a-z]+ of [1-9]\d cars cost \$[1-9]\d{3} or [1-9]\.")
    rng = np.random.default_rng(0)
    varied = {fewshot.vary_numbers(text, rng) for _ in range(20)}
    assert len(varied) > 15
    assert all(form.fullmatch(v) for v in varied)


def test_questions_with_other_numbers_are_distinct_and_not_the_heads():
    task = fewshot.Task("t", "", (("Is 1 two?", "No."),))
    rng = np.random.default_rng(0)
    questions = fewshot.with_other_numbers(task, [task], 30, rng)
    assert len(questions) == len(set(questions)) == 30
    assert "Is 1 two?" not in questions


BIBLE = """Ruth 1

  1 First verse.
  2 Second verse.

1 John 4

  1 Another.
"""


def test_bible_is_read_by_chapter():
    assert list(documents.read_bible(BIBLE)) == [
        documents.Chapter("Ruth", "Ruth 1", ("1 First verse.", "2 Second verse.")),
        documents.Chapter("1 John", "1 John 4", ("1 Another.",)),
    ]


def test_headed_text_is_read_between_kept_headings():
    before, after = "Title\n\nPreamble\n\nWe.", "Amendments\n\nNote"
    text = f"{before}\n\nArticle I\n\nOne\n  line.\n\n│ x │\n\nTwo.\n\n{after}"
    assert list(documents.read_constitution(text)) == [
        documents.Chapter("The Constitution", "Article I", ("One line.", "Two."))
    ]
    assert not list(documents.read_jargon(text))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 100))
@settings(max_examples=60)
def test_split_keeps_all_paragraphs_in_order(sizes, size):
    paragraphs = tuple("x" * n for n in sizes)
    parts = list(documents.split(paragraphs, size))
    assert sum(parts, ()) == paragraphs
    assert all(parts)
    assert len(parts) <= max(1, round(sum(sizes) / size))


def test_documents_form_a_tree():
    chapters = [
        documents.Chapter(
            document, f"{document} {c}", tuple(f"{document}{c}.{v} " * 30 for v in range(20))
        )
        for document in ("A", "B")
        for c in range(3)
    ]
    built = documents.build(chapters, most=2)
    assert built.equals(documents.build(chapters, most=2))
    rows = built.to_pylist()
    assert len({row["chapter"] for row in rows}) == 4
    assert len(rows) == len({row["section_text"] for row in rows}) * len(documents.QUESTIONS)
    for above, below in (("document", "doc_head"), ("chapter", "chapter_text")):
        assert len({row[above] for row in rows}) == len({(row[above], row[below]) for row in rows})
    assert all(row["section_text"] in row["chapter_text"] for row in rows)
    assert len(documents.build(chapters, most=0)) > len(built)
