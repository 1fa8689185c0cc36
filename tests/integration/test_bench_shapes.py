"""The ladder's random models: every engine reads the weights that `--load-format dummy` makes."""

from pathlib import Path

import pytest
from builders import tiny_config, write_tokenizer
from yardstick import load_ladder

from batchllm.models.checkpoint import open_checkpoint
from batchllm.models.dummy_checkpoint import DummyCheckpoint
from batchllm.models.shapes import CONFIGS

engines = load_ladder("bench_engines.engines")
export_shape = load_ladder("bench_engines.export_shape")
subject = load_ladder("bench_engines.subject")


def test_a_shape_is_written_as_it_is_made(monkeypatch, tmp_path):
    values = tiny_config(dtype="bfloat16")
    (tmp_path / "from").mkdir()
    write_tokenizer(tmp_path / "from")
    monkeypatch.setattr(export_shape, "TOKENIZER", tmp_path / "from")
    monkeypatch.setitem(export_shape.PUBLISHED, "tiny", values)
    made = type(CONFIGS["llama-3.2-1b"]).from_hugging_face(values)
    monkeypatch.setitem(CONFIGS, "tiny", made)
    export_shape.export("tiny", tmp_path / "to")

    written = open_checkpoint(tmp_path / "to")
    assert written.config.max_position_embeddings == export_shape.CONTEXT
    assert written.config.num_layers == made.num_layers
    wanted = dict(DummyCheckpoint.of("tiny").weights())
    found = dict(written.weights())
    assert found.keys() == wanted.keys()
    assert all((found[name] == wanted[name]).all() for name in wanted)


def test_the_bound_is_the_shape_s_own():
    for name in ("llama-3.2-1b", "qwen2.5-0.5b"):
        sizes, config = subject.shape_subject(name).sizes, CONFIGS[name]
        norms = config.hidden_size * (2 * config.num_layers + 1)
        biases = 0
        if config.attention_bias:
            width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
            biases = config.num_layers * width
        counted = sizes.body_parameters + sizes.head_parameters + norms + biases
        assert counted == {"llama-3.2-1b": 1_235_814_400, "qwen2.5-0.5b": 494_032_768}[name]


def test_an_unknown_shape_is_refused():
    with pytest.raises(engines.BenchError, match=r"did you mean .llama-3\.2-1b."):
        subject.shape_subject("llama-3.2-2b")


def test_weights_are_written_once_and_for_who_reads_them(monkeypatch, tmp_path):
    monkeypatch.setattr(subject, "BENCH", tmp_path)
    ran = []

    def run_json(command):
        ran.append(Path(command[1]).name)
        Path(command[3]).mkdir(parents=True)
        (Path(command[3]) / "config.json").write_text("{}")
        return [{}]

    monkeypatch.setattr(subject, "run_json", run_json)
    ours = subject.shape_subject("llama-3.2-1b")
    known = engines.engines(ours.weights, Path("py"))
    ours.make([known["batchllm"], known["vllm"]])
    assert ran == ["export_shape.py"]
    ours.make([known["vllm"], known["vllm-int8"]])
    assert ran == ["export_shape.py", "export_int8.py"]
    other = subject.shape_subject("qwen2.5-0.5b")
    other.make([engines.engines(other.weights, Path("py"))["vllm-int8"]])
    assert ran[2:] == ["export_shape.py", "export_int8.py"]
    subject.default_subject(Path("m")).make(known.values())
    assert len(ran) == 4


def test_a_missing_tokenizer_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(export_shape, "TOKENIZER", tmp_path / "no")
    with pytest.raises(SystemExit, match="bench_setup"):
        export_shape.export("smollm2-135m", tmp_path / "to")
    assert not (tmp_path / "to").exists()
