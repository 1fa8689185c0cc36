"""Tiny models made on the spot: tokenizers, configs, weights, and files in every format we read.

Nothing here needs torch. The byte-level vocabulary is three special tokens, the 256 bytes and a few
merges; the SentencePiece one is <unk> <s> </s>, the 256 byte tokens, letters and a few words.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from gguf import quants
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from batchllm.models.config import ModelConfig
from batchllm.models.layout import expected_tensors
from batchllm.text.tokenizer import Tokenizer

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the", "Ċ Ċ", "Ġ Ġ", "1 2", "12 3", "h e", "l l", "he ll", "hell o"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def byte_level_tokens(merges=MERGES):
    """The vocabulary in id order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL_TOKENS, *alphabet, *(merge.replace(" ", "") for merge in merges)]


def tiny_backend():
    """A byte-level BPE `tokenizers.Tokenizer` with GPT-2's split."""
    vocab = {token: i for i, token in enumerate(byte_level_tokens())}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in MERGES]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    return backend


def tiny_tokenizer(*, chat_template=CHATML):
    """A `Tokenizer` over the byte-level vocabulary; ids 0 and 2 end an answer."""
    return Tokenizer(
        tiny_backend(),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        eos_token_ids=(0, 2),
        chat_template=chat_template,
    )


def tiny_config(**changes):
    """A `config.json` of a two-layer Llama over the byte-level vocabulary, as a dict."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(byte_level_tokens()),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "eos_token_id": 2,
        "bos_token_id": 1,
    } | changes


def random_weights(config, seed=0):
    """Every tensor of a model with this config dict, float32, by canonical name."""
    generator = np.random.default_rng(seed)
    shapes = expected_tensors(ModelConfig.from_hugging_face(config))
    return {n: generator.standard_normal(s, dtype=np.float32) / 8 for n, s in shapes.items()}


def write_safetensors_model(directory, *, config=None, weights=None, shards=1, tokenizer=True):
    """Write a model directory in the Hugging Face layout and return it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config() if config is None else config
    weights = random_weights(config) if weights is None else weights
    write_json(directory / "config.json", config)
    if tokenizer:
        write_tokenizer(directory)
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return directory
    names = list(weights)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    return directory


def write_tokenizer(directory, **changes):
    """Write tokenizer.json and tokenizer_config.json (with a chat template)."""
    tiny_backend().save(str(Path(directory) / "tokenizer.json"))
    tokens = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    write_json(
        Path(directory) / "tokenizer_config.json", tokens | {"chat_template": CHATML} | changes
    )


def write_json(path, value):
    Path(path).write_text(json.dumps(value), encoding="utf-8")


def write_gguf_model(
    path, *, config=None, weights=None, qtype="F32", tokenizer=None, metadata=None, extra=None
):
    """Write a model as one GGUF file, laid out as llama.cpp does, and return its path.

    `qtype` is the ggml type of matrices whose rows it divides (others stay F32); `tokenizer` are
    the `tokenizer.*` values (`byte_level_metadata()` where None); `metadata` adds or, where a value
    is None, removes keys; `extra` are further tensors.
    """
    config = tiny_config() if config is None else config
    weights = random_weights(config) if weights is None else weights
    tokenizer = byte_level_metadata() if tokenizer is None else tokenizer
    family = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}[config["architectures"][0]]
    writer = gguf.GGUFWriter(path, family)
    for key, value in (sizes_metadata(config, family) | tokenizer | (metadata or {})).items():
        add_value(writer, key, value)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in weights.items():
        part = name.split(".")[-2]
        if part in heads and family == "llama":
            tensor = llama_cpp_rows(tensor, heads[part])
        add_tensor(writer, gguf_name(name), tensor, qtype)
    for name, tensor in (extra or {}).items():
        add_tensor(writer, name, tensor, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def llama_cpp_rows(tensor, num_heads):
    """Interleave each head's two halves of rows, as llama.cpp's converter does."""
    halves = tensor.reshape(num_heads, 2, -1, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def sizes_metadata(config, family):
    values = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "rope.dimension_count": config["head_dim"],
        "rope.freq_base": config["rope_parameters"]["rope_theta"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    return {f"{family}.{key}": value for key, value in values.items()}


def byte_level_metadata(**changes):
    """The `tokenizer.*` values of the byte-level vocabulary; `changes` by a key's last part."""
    tokens = byte_level_tokens()
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": np.array([3] * 3 + [1] * (len(tokens) - 3), dtype=np.int32),
        "merges": list(MERGES),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": False,
    }
    named = {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items()}
    return {"tokenizer.chat_template": CHATML} | named


def sentencepiece_metadata(**changes):
    """The `tokenizer.*` values of a small SentencePiece vocabulary."""
    pieces = {"▁": -9.0, **{c: -10.0 - i for i, c in enumerate("helowrd<>s/1")}}
    # "he" beats "el" beats "ll"; "lo" is the worst of them.
    pieces |= {"he": -1.0, "el": -2.0, "ll": -3.0, "lo": -4.0, "▁he": -5.0, "▁hell": -6.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    values = {
        "model": "llama",
        "tokens": tokens,
        "scores": np.array([0.0] * 259 + list(pieces.values()), dtype=np.float32),
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces), dtype=np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | changes).items()}


def gguf_name(name):
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
    stem, _, kind = name.rpartition(".")
    layer = ""
    if stem.startswith("model.layers."):
        number, _, stem = stem.removeprefix("model.layers.").partition(".")
        layer = f"blk.{number}."
    return f"{layer}{_GGUF_NAMES[stem]}.{kind}"


def add_value(writer, key, value):
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, np.asarray(value).tolist())


def add_tensor(writer, name, tensor, qtype):
    kind = gguf.GGMLQuantizationType[qtype]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if qtype == "F32" or tensor.ndim < 2 or tensor.shape[-1] % block:
        writer.add_tensor(name, tensor.astype(np.float32))
    elif qtype == "F16":
        writer.add_tensor(name, tensor.astype(np.float16))
    else:
        writer.add_tensor(name, quants.quantize(tensor, kind), raw_dtype=kind)
