"""Checkpoints of both formats, opened without torch: what is read, and what is refused."""

import math
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
from builders import (
    add_value,
    byte_level_metadata,
    llama_cpp_rows,
    random_weights,
    tiny_config,
    write_gguf_model,
    write_json,
    write_safetensors_model,
)
from gguf import quants

from batchllm.errors import ModelError
from batchllm.models.checkpoint import open_checkpoint
from batchllm.models.config import ModelConfig, RopeScaling
from batchllm.models.gguf_checkpoint import dequantized_chunks, hugging_face_row_order
from batchllm.models.gguf_file import GGUFFile
from batchllm.models.layout import expected_tensors


def refuses(path, says):
    with pytest.raises(ModelError, match=says) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


# GGUF


def test_gguf_config_is_the_directory_s(tmp_path):
    config = tiny_config(tie_word_embeddings=False)
    ours = open_checkpoint(write_gguf_model(tmp_path / "m.gguf", config=config)).config
    assert ours.eos_token_ids == (0, 2)
    expected = ModelConfig.from_hugging_face(config | {"eos_token_id": [0, 2]})
    assert ours.rms_norm_eps == pytest.approx(expected.rms_norm_eps)
    for name in ModelConfig.__slots__:
        if name != "rms_norm_eps":
            assert getattr(ours, name) == getattr(expected, name), name


def test_gguf_metadata_of_every_type(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    scalars = {
        "uint8": 200,
        "int8": -3,
        "uint16": 60000,
        "int16": -300,
        "uint32": 4 * 10**9,
        "int32": -(10**6),
        "uint64": 2**60,
        "int64": -(2**60),
        "float32": 0.5,
        "float64": 1e300,
        "bool": True,
        "string": "é",
    }
    for kind, value in scalars.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_array("x.strings", ["a", "", "日本"])
    writer.add_array("x.numbers", [1, -2, 3])
    writer.add_array("x.flags", [True, False])
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    assert {k: file.metadata[f"x.{k}"] for k in scalars} == scalars
    assert file.metadata["x.strings"] == ["a", "", "日本"]
    assert file.metadata["x.numbers"].tolist() == [1, -2, 3]
    assert file.metadata["x.flags"].tolist() == [True, False]
    assert file.tensors["t"].shape == (2, 3)
    assert file.rows(file.tensors["t"]).view(np.float32).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_gguf_truncated_anywhere_is_refused(tmp_path):
    whole = write_gguf_model(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 4, 10, 30, 100, 1000, 5000, len(whole) // 2, len(whole) - 64):
        cut.write_bytes(whole[:size])
        refuses(cut, "truncated|not a GGUF|is empty")


@pytest.mark.parametrize("value", ["text", ["some", "texts"]])
def test_gguf_cut_within_its_last_string_is_refused(tmp_path, value):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    add_value(writer, "x", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert list(GGUFFile(path).metadata["x"]) == list(value)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="truncated"):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("version", "says"), [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")]
)
def test_gguf_of_another_version(tmp_path, version, says):
    whole = bytearray(write_gguf_model(tmp_path / "m.gguf").read_bytes())
    whole[4:8] = struct.pack("<I", version)
    (tmp_path / "m.gguf").write_bytes(whole)
    refuses(tmp_path / "m.gguf", says)


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" * 100)
    refuses(tmp_path / "m.gguf", "not a GGUF file")


def test_gguf_of_an_unknown_tensor_type(tmp_path):
    path = write_gguf_model(tmp_path / "m.gguf")
    whole = path.read_bytes()
    name = b"blk.0.attn_q.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8
    path.write_bytes(whole[:at] + struct.pack("<I", 250) + whole[at + 4 :])
    refuses(path, "blk.0.attn_q.weight has the unknown ggml type 250")
    path.write_bytes(whole[:at] + struct.pack("<I", 26) + whole[at + 4 :])  # 32-bit integers
    refuses(path, "attn_q.weight has type I32, which cannot be dequantised")


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.rope.dimension_count": 8}, "only 8 of 16 dimensions are rotary"),
        ({"llama.attention.value_length": 8}, "different sizes"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not supported"),
        ({"llama.attention.head_count_kv": [2, 1]}, "differs from layer to layer"),
        ({"llama.block_count": None}, "num_hidden_layers is missing"),
        ({"llama.block_count": 3}, "blk|model.layers.2.*is missing"),
        ({"llama.block_count": 1}, "model.layers.1.*is not part of"),
        ({"llama.feed_forward_length": 95}, r"shape \[96, 64\], but the config says \[95, 64\]"),
        ({"split.count": 3}, "3 parts"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "9999, outside the vocabulary"),
        ({"tokenizer.ggml.tokens": None}, "no vocabulary"),
    ],
)
def test_gguf_models_that_are_refused(tmp_path, metadata, says):
    refuses(write_gguf_model(tmp_path / "m.gguf", metadata=metadata), says)


def test_gguf_of_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    writer.add_tensor("t", np.zeros((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuses(tmp_path / "m.gguf", "'gemma3' is not supported; supported: llama")


def test_gguf_tokenizer_trouble_names_the_file(tmp_path):
    path = write_gguf_model(tmp_path / "m.gguf", tokenizer=byte_level_metadata(pre="tekken"))
    with pytest.raises(ModelError, match=r"m\.gguf: .*tekken.*safetensors directory"):
        open_checkpoint(path).tokenizer()


def llama3_factors(factor, original, theta=10000.0, head_dim=16):
    """By the published definition: wavelengths against two thresholds."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < original / 4:
            factors.append(1.0)
        elif wavelength > original / 1:
            factors.append(factor)
        else:
            smooth = (original / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def test_gguf_rope_factors_are_honoured_or_refused(tmp_path):
    def scaling(factors, **metadata):
        path = write_gguf_model(
            tmp_path / "m.gguf", extra={"rope_freqs.weight": factors}, metadata=metadata
        )
        return open_checkpoint(path).config.rope_scaling

    assert scaling(llama3_factors(32.0, 8192)) == RopeScaling(kind="llama3", factor=32.0)
    key = "llama.rope.scaling.original_context_length"
    found = scaling(llama3_factors(8.0, 1024), **{key: 1024})
    assert (found.factor, found.original_max_position_embeddings) == (8.0, 1024)
    assert scaling(np.ones(8, np.float32)) is None
    with pytest.raises(ModelError, match="other than Llama 3's"):
        scaling(np.linspace(1, 8, 8, dtype=np.float32))


def test_gguf_linear_rope_scaling(tmp_path):
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    config = open_checkpoint(write_gguf_model(tmp_path / "m.gguf", metadata=metadata)).config
    assert config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


@pytest.mark.parametrize(
    ("qtype", "dtype"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")],
)
def test_gguf_stored_dtype(tmp_path, qtype, dtype):
    path = write_gguf_model(tmp_path / "m.gguf", qtype=qtype)
    assert open_checkpoint(path).config.dtype == dtype


@pytest.mark.parametrize("qtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_dequantized_chunks_are_the_tensor(tmp_path, qtype, monkeypatch):
    monkeypatch.setattr("batchllm.models.gguf_checkpoint._CHUNK_ELEMENTS", 1000)
    weights = random_weights(tiny_config())
    file = GGUFFile(write_gguf_model(tmp_path / "m.gguf", weights=weights, qtype=qtype))
    tensor = file.tensors["blk.1.ffn_down.weight"]
    chunks = list(dequantized_chunks(file.rows(tensor), tensor))
    assert len(chunks) > 1
    assert all(chunk.dtype == np.float32 and chunk.flags.writeable for chunk in chunks)
    values = np.concatenate(chunks)
    original = weights["model.layers.1.mlp.down_proj.weight"]
    kind = gguf.GGMLQuantizationType[qtype]
    np.testing.assert_array_equal(values, quants.dequantize(quants.quantize(original, kind), kind))
    assert np.abs(values - original).max() < (0.05 if qtype.startswith("Q4") else 0.03)


@pytest.mark.parametrize("qtype", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_k_quants_are_dequantised(tmp_path, qtype):
    kind = gguf.GGMLQuantizationType[qtype]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 60, (4, 2 * 256 // block * block_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("t", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    values = np.concatenate(
        list(dequantized_chunks(file.rows(file.tensors["t"]), file.tensors["t"]))
    )
    assert file.tensors["t"].shape == values.shape == (4, 512)
    np.testing.assert_array_equal(values, quants.dequantize(raw, kind))


def test_row_order_undoes_llama_cpp_s():
    assert hugging_face_row_order(1, 8).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    rows = np.arange(3 * 8 * 5).reshape(24, 5)
    np.testing.assert_array_equal(llama_cpp_rows(rows, 3)[hugging_face_row_order(3, 8)], rows)


# Safetensors


@pytest.mark.parametrize("shards", [1, 3])
def test_directory(tmp_path, shards):
    path = write_safetensors_model(tmp_path / "m", shards=shards)
    write_json(path / "generation_config.json", {"eos_token_id": [0, 2]})
    checkpoint = open_checkpoint(path)
    assert checkpoint.path == path
    expected = ModelConfig.from_hugging_face(tiny_config(eos_token_id=[0, 2]))
    assert checkpoint.config == expected
    assert checkpoint.tokenizer().eos_token_ids == (0, 2)


def test_stored_dtype_is_the_file_s_and_not_the_config_s(tmp_path):
    weights = {n: w.astype(np.float16) for n, w in random_weights(tiny_config()).items()}
    path = write_safetensors_model(tmp_path / "m", weights=weights)
    assert open_checkpoint(path).config.dtype == "float16"


def test_tied_copies_and_derived_buffers_are_left_out(tmp_path):
    weights = random_weights(tiny_config())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    open_checkpoint(write_safetensors_model(tmp_path / "m", weights=weights))


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("config.json", "config.json is missing, and there is no GGUF file"),
        ("tokenizer.json", "tokenizer.json is missing"),
        ("model.safetensors", "no weights"),
    ],
)
def test_missing_files(tmp_path, file, says):
    path = write_safetensors_model(tmp_path / "m")
    (path / file).unlink()
    refuses(path, says)


def test_a_missing_shard(tmp_path):
    path = write_safetensors_model(tmp_path / "m", shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    refuses(path, "model-00002-of-00003.safetensors, named in the index, is missing")


def test_pickles_are_refused(tmp_path):
    path = write_safetensors_model(tmp_path / "m")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    refuses(path, "pickled weights only.*convert them to safetensors")


def test_safetensors_truncated_anywhere_is_refused(tmp_path):
    path = write_safetensors_model(tmp_path / "m")
    whole = (path / "model.safetensors").read_bytes()
    for size in (0, 5, 8, 100, 3000, len(whole) // 2, len(whole) - 1):
        (path / "model.safetensors").write_bytes(whole[:size])
        refuses(path, "truncated")


def test_a_damaged_safetensors_header(tmp_path):
    path = write_safetensors_model(tmp_path / "m")
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:8] + b"x" + whole[9:])
    refuses(path, "damaged")


def test_weights_are_held_against_the_config(tmp_path):
    weights = random_weights(tiny_config())
    del weights["model.norm.weight"]
    refuses(
        write_safetensors_model(tmp_path / "a", weights=weights), "model.norm.weight is missing"
    )
    weights = random_weights(tiny_config()) | {"model.extra.weight": np.ones(3, np.float32)}
    refuses(write_safetensors_model(tmp_path / "b", weights=weights), "model.extra.weight is not")
    config = tiny_config(intermediate_size=32)
    refuses(
        write_safetensors_model(
            tmp_path / "c", config=config, weights=random_weights(tiny_config())
        ),
        r"shape \[96, 64\], but the config says \[32, 64\]",
    )
    weights = random_weights(tiny_config())
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.float64)
    refuses(write_safetensors_model(tmp_path / "d", weights=weights), "type F64")


def test_biases_and_untied_heads_are_expected_where_the_config_says():
    config = tiny_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    shapes = expected_tensors(ModelConfig.from_hugging_face(config))
    assert shapes["model.layers.1.self_attn.k_proj.bias"] == (32,)
    assert shapes["model.layers.1.self_attn.o_proj.bias"] == (64,)
    assert shapes["model.layers.0.mlp.down_proj.bias"] == (64,)
    assert shapes["lm_head.weight"] == (270, 64)
    assert len(shapes) == 3 + 2 * (2 + 4 * 2 + 3 * 2)


# Either


def test_what_is_not_there(tmp_path):
    refuses(tmp_path / "nothing", "no such file or directory")
    path = write_safetensors_model(tmp_path / "m")
    refuses(path / "model.safetensors", "give the directory")


def test_a_directory_with_gguf_files(tmp_path):
    first = write_gguf_model(tmp_path / "a.gguf")
    assert open_checkpoint(tmp_path).path == first
    write_gguf_model(tmp_path / "b.gguf")
    refuses(tmp_path, r"2 GGUF files, give the path of one: a\.gguf, b\.gguf")


def test_identity_tells_models_apart_wherever_they_lie(tmp_path):
    def identities(seed, where):
        weights = random_weights(tiny_config(), seed)
        directory = write_safetensors_model(tmp_path / where / "m", weights=weights)
        file = write_gguf_model(tmp_path / where / "m.gguf", weights=weights)
        return open_checkpoint(directory).identity(), open_checkpoint(file).identity()

    first = identities(0, "a")
    assert identities(0, "b") == first
    for ours, theirs in zip(first, identities(1, "c"), strict=True):
        assert ours.keys() == theirs.keys()
        assert ours != theirs
    assert all(isinstance(v, str) for identity in first for v in identity.values())


def test_opening_a_model_imports_no_torch(tmp_path):
    paths = [write_gguf_model(tmp_path / "m.gguf"), write_safetensors_model(tmp_path / "m")]
    code = (
        "import sys; from pathlib import Path; from batchllm.models.checkpoint import *\n"
        "from batchllm.models.locate import resolve\n"
        "from batchllm.text.prompts import PromptBuilder\n"
        "for p in sys.argv[1:]: c = open_checkpoint(Path(p)); c.tokenizer(); c.identity()\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True)
