"""`batchllm run` and its companions, end to end on a tiny model."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import write_gguf_model
from cli_runs import ROWS, answers, invoke, run

from batchllm import LLM, SamplingParams
from batchllm.io.output import OutputStore


def test_a_table_is_answered_in_order_with_its_own_columns(
    source, table, tmp_path, tiny_model, expected
):
    output, summary = tmp_path / "out.parquet", tmp_path / "summary.json"
    assert run(source, output, tiny_model, "--summary", summary).exit_code == 0
    done = pq.read_table(output)
    assert done.select(table.column_names).equals(table)
    assert done["answer"].to_pylist() == expected
    assert done.schema.metadata[b"made by"] == b"a test"
    facts = json.loads(summary.read_text())
    for key in (
        *("rows", "failed", "prompt_tokens", "computed_prompt_tokens", "output_tokens"),
        *("load_seconds", "plan_seconds", "engine_seconds", "wall_seconds", "steps"),
        *("preemptions", "peak_kv_blocks", "threads", "kv_memory", "kv_tokens"),
    ):
        assert isinstance(facts[key], int | float), key
    assert (facts["rows"], facts["failed"]) == (ROWS, 0)
    assert facts["computed_prompt_tokens"] < facts["prompt_tokens"]
    assert 0.9 < facts["kv_memory"] / (16 << 20) <= 1
    assert facts["kv_tokens"] == facts["num_kv_blocks"] * facts["block_size"]
    stored = json.loads(pq.read_metadata(output).metadata[b"batchllm"])
    assert stored["summary"] == facts
    shown = json.loads(invoke("inspect", output, "--json").stdout)
    assert shown["summary"] == facts and shown["state"] == "complete"
    assert "50 of 50 rows" in invoke("inspect", output).stdout
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("window_rows", [1, 7, 13, 1000])
@pytest.mark.parametrize("kind", ["out.parquet", "out"])
def test_any_window_size_gives_the_same(source, tmp_path, tiny_model, expected, window_rows, kind):
    output = tmp_path / kind
    assert run(source, output, tiny_model, "--window-rows", window_rows).exit_code == 0
    assert answers(output) == expected


def test_prompts_that_another_process_makes_are_the_same(
    source, tmp_path, tiny_model, expected, monkeypatch
):
    monkeypatch.setattr("batchllm.prompt_worker._WORTH_ROWS", 0)
    output = tmp_path / "o.parquet"
    assert run(source, output, tiny_model, "--window-rows", 20).exit_code == 0
    assert answers(output) == expected
    shown = invoke("inspect", output).stdout
    assert "windows         3, losing " in shown


@pytest.mark.parametrize(
    "extra",
    [
        ("--no-sharing",),
        ("--policy", "table-order"),
        ("--threads", 1),
        ("--kv-memory", "200k"),
        ("--max-num-batched-tokens", 5),
    ],
)
def test_engine_options_change_no_answer(source, tmp_path, tiny_model, expected, extra):
    assert run(source, tmp_path / "o.parquet", tiny_model, *extra).exit_code == 0
    assert answers(tmp_path / "o.parquet") == expected


def test_a_gguf_model_answers_like_its_safetensors(source, tmp_path, tiny_model):
    from builders import random_weights, tiny_config

    config = tiny_config(max_position_embeddings=512)
    gguf = write_gguf_model(
        tmp_path / "m.gguf", config=config, weights=random_weights(config), qtype="F32"
    )
    assert run(source, tmp_path / "a.parquet", gguf, "--dtype", "float32").exit_code == 0
    assert run(source, tmp_path / "b.parquet", tiny_model, "--dtype", "float32").exit_code == 0
    assert answers(tmp_path / "a.parquet") == answers(tmp_path / "b.parquet")


def test_prompt_sources(source, table, tmp_path, tiny_model, expected):
    template = tmp_path / "t.txt"
    template.write_text("{{ text }}")
    for i, extra in enumerate([("--template", "{{ text }}"), ("--template", f"@{template}")]):
        output = tmp_path / f"{i}.parquet"
        assert run(source, output, tiny_model, *extra).exit_code == 0
        assert answers(output) == expected
    texts = table["text"].to_pylist()
    chats = pa.array([[{"role": "user", "content": t}] for t in texts])
    pq.write_table(pa.table({"m": chats}), tmp_path / "m.parquet")
    output = tmp_path / "chats.parquet"
    assert run(tmp_path / "m.parquet", output, tiny_model, "--messages-column", "m").exit_code == 0
    assert answers(output) == expected
    ids = pa.array([[30 + i % 5, 31, 32] for i in range(10)], pa.list_(pa.int32()))
    pq.write_table(pa.table({"ids": ids}), tmp_path / "ids.parquet")
    output = tmp_path / "ids-out.parquet"
    result = run(tmp_path / "ids.parquet", output, tiny_model, "--token-ids-column", "ids")
    assert result.exit_code == 0
    assert pq.read_table(output)["prompt_tokens"].to_pylist() == [3] * 10


def test_row_limits_and_limit(source, tmp_path, tiny_model):
    output = tmp_path / "o.parquet"
    extra = ("--max-tokens-column", "limit", "--ignore-eos", "--limit", 20)
    assert run(source, output, tiny_model, *extra).exit_code == 0
    done = pq.read_table(output)
    assert done["output_tokens"].to_pylist() == [1 + i % 9 for i in range(20)]


def test_a_hive_directory_keeps_its_partitions(table, tmp_path, tiny_model):
    for day in (1, 2):
        part = tmp_path / "in" / f"day={day}"
        part.mkdir(parents=True)
        pq.write_table(table.slice(10 * day, 10), part / "x.parquet")
    assert run(tmp_path / "in", tmp_path / "o.parquet", tiny_model).exit_code == 0
    done = pq.read_table(tmp_path / "o.parquet")
    assert done["id"].to_pylist() == list(range(10, 30))
    assert done["day"].to_pylist() == [1] * 10 + [2] * 10


def test_the_same_command_again_changes_nothing_and_another_is_refused(
    source, tmp_path, tiny_model
):
    output = tmp_path / "o.parquet"
    assert run(source, output, tiny_model).exit_code == 0
    before = (output.read_bytes(), output.stat().st_mtime_ns)
    assert run(source, output, tiny_model, "--window-rows", 3, "--no-sharing").exit_code == 0
    assert (output.read_bytes(), output.stat().st_mtime_ns) == before
    refused = run(source, output, tiny_model, "--temperature", 0.5)
    assert refused.exit_code == 1
    assert "sampling.temperature is 0.5, was 0.0" in refused.stderr
    pq.write_table(pq.read_table(source).slice(1), source)
    refused = run(source, output, tiny_model)
    assert refused.exit_code == 1 and "input.sha256 differs" in refused.stderr
    assert (output.read_bytes(), output.stat().st_mtime_ns) == before


def test_a_failed_row_is_counted_and_may_fail_the_job(tmp_path, tiny_model):
    texts = ["a", None, "b", "c" * 2000, "d"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet")
    for limit, code in (("2", 0), ("1", 3)):
        output = tmp_path / f"{limit}.parquet"
        result = run(tmp_path / "in.parquet", output, tiny_model, "--max-errors", limit)
        assert result.exit_code == code
        errors = [e and e.split(":")[0] for e in pq.read_table(output)["error"].to_pylist()]
        assert errors == [None, "null_prompt", None, "prompt_too_long", None]


def test_an_empty_table_gives_an_empty_table(table, tmp_path, tiny_model):
    pq.write_table(table.slice(0, 0), tmp_path / "in.parquet")
    assert run(tmp_path / "in.parquet", tmp_path / "o.parquet", tiny_model).exit_code == 0
    done = pq.read_table(tmp_path / "o.parquet")
    assert done.num_rows == 0 and "answer" in done.column_names


def test_bad_usage_is_one_line_and_code_2(source, tmp_path, tiny_model):
    output = tmp_path / "o.parquet"
    for extra, words in (
        (("--prompt-column", "txet"), "txet"),
        (("--template", "{{ nothing }}"), "nothing"),
        (("--prompt-column", "id"), "id"),
        (("--prompt-column", "text", "--template", "{{ text }}"), "exclude each other"),
        ((), "no prompt is given"),
        (("--prompt-column", "text", "--output-column", "id"), "choose another"),
        (("--prompt-column", "text", "--policy", "magic"), "ratio"),
        (("--prompt-column", "text", "--dtype", "int3"), "int3"),
        (("--prompt-column", "text", "--kv-memory", "lots"), "not a size"),
        (("--prompt-column", "text", "--kv-memory", "99T"), "are free"),
        (("--prompt-column", "text", "--threads", "0"), "at least 1, or left out"),
        (("--prompt-column", "text", "--max-tokens", "0"), "max_tokens"),
        (("--prompt-column", "text", "--limit", "0"), "limit"),
        (("--prompt-column", "text", "--template", f"@{tmp_path}/none"), ""),
        (("--prompt-column", "text", "--summary", str(tmp_path / "no" / "s.json")), "summary"),
        (("--prompt-column", "text", "--reorder-fields"), "no fields to reorder"),
        (("--no-such-option",), "no-such-option"),
    ):
        result = invoke("run", source, output, "--model", tiny_model, *extra)
        assert result.exit_code == 2, (extra, result.stderr)
        assert words in result.stderr, (extra, result.stderr)
        assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("*o.parquet*"))


def test_broken_files_are_one_line_and_code_1(source, tmp_path, tiny_model):
    (tmp_path / "empty.parquet").write_bytes(b"")
    whole = source.read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.parquet").write_text("not parquet at all, not parquet at all")
    gguf = write_gguf_model(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(gguf[:-5000])
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (tmp_path / "foreign.parquet").write_bytes(whole)
    good = tmp_path / "o.parquet"
    for where, output, model in (
        (tmp_path / "empty.parquet", good, tiny_model),
        (tmp_path / "cut.parquet", good, tiny_model),
        (tmp_path / "text.parquet", good, tiny_model),
        (tmp_path / "missing.parquet", good, tiny_model),
        (source, good, tmp_path / "cut.gguf"),
        (source, good, tmp_path / "bare"),
        (source, good, tmp_path / "missing-model.gguf"),
        (source, tmp_path / "foreign.parquet", tiny_model),
        (source, source, tiny_model),
        (source, Path("/proc/none/o.parquet"), tiny_model),
    ):
        result = run(where, output, model)
        assert result.exit_code in (1, 2), (where, output, model)
        assert result.stderr.startswith("batchllm: "), result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
    assert not good.exists()
    assert (tmp_path / "foreign.parquet").read_bytes() == whole == source.read_bytes()


def test_plan_counts_what_a_run_computes(source, tmp_path, tiny_model):
    prompt = ("--model", tiny_model, "--prompt-column", "text")
    report = json.loads(invoke("plan", source, *prompt, "--json").stdout)
    summary = tmp_path / "s.json"
    run(source, tmp_path / "o.parquet", tiny_model, "--summary", summary)
    facts = json.loads(summary.read_text())
    assert report["computed_tokens"] == facts["computed_prompt_tokens"]
    assert report["prompt_tokens"] == facts["prompt_tokens"]
    assert report["duplicate_rows"] == facts["duplicate_rows"]
    page = invoke("plan", source, *prompt).stdout
    assert "shared words" in page and f"{report['prompt_tokens']:,}" in page


REORDER = ("--template", "{{ row | tojson }}", "--no-chat", "--reorder-fields")


def test_reordered_fields_do_not_depend_on_windows_or_interruptions(
    source, table, tmp_path, tiny_model, monkeypatch
):
    summary = tmp_path / "s.json"
    once = tmp_path / "once.parquet"
    assert run(source, once, tiny_model, *REORDER, "--summary", summary).exit_code == 0
    given = tmp_path / "given.parquet"
    assert run(source, given, tiny_model, *REORDER[:3]).exit_code == 0
    assert answers(once) != answers(given)  # it is another prompt
    write = OutputStore.write_answers

    def fail_at_the_third(store, rows, *rest):
        if len(store.counters) == 2:
            raise KeyboardInterrupt
        write(store, rows, *rest)

    output = tmp_path / "o.parquet"
    monkeypatch.setattr(OutputStore, "write_answers", fail_at_the_third)
    assert run(source, output, tiny_model, *REORDER, "--window-rows", 7).exit_code == 130
    monkeypatch.undo()
    assert run(source, output, tiny_model, *REORDER, "--window-rows", 9).exit_code == 0
    assert answers(output) == answers(once)
    refused = run(source, output, tiny_model, *REORDER[:3])
    assert refused.exit_code == 1
    assert "prompt.reorder_fields is false, was true" in refused.stderr
    llm = LLM(tiny_model, kv_memory=16 << 20)
    params = SamplingParams(max_tokens=6)
    direct = llm.generate(table, params, template=REORDER[1], chat=False, reorder_fields=True)
    assert direct["answer"].to_pylist() == answers(once)
    plan = ("plan", source, "--model", tiny_model, "--json")
    report = json.loads(invoke(*plan, *REORDER).stdout)
    assert report["computed_tokens"] == json.loads(summary.read_text())["computed_prompt_tokens"]
    before = json.loads(invoke(*plan, *REORDER[:3]).stdout)
    assert report["computed_tokens"] < before["computed_tokens"]
    assert "--reorder-fields" in before["advice"][0] and report["advice"] == []


def test_models_lists_the_default():
    assert "smollm2-135m-instruct (default)" in invoke("models").stdout
