"""Damaged GGUF files: headers, vocabularies, tensors' places."""

import struct

from builders import (
    byte_level_metadata,
    sentencepiece_metadata,
    tiny_config,
    write_gguf_model,
)

from batchllm.models.checkpoint import open_checkpoint
from fuzzing.models import use
from fuzzing.mutate import NUMBERS, TEXTS, damaged


class Gguf:
    """Bytes of the header damaged, or values that a header should not have."""

    def __init__(self, scratch):
        self._path = scratch / "m.gguf"
        self._seeds = []
        small = tiny_config(num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=8)
        words = sentencepiece_metadata()
        sizes = [
            (small, byte_level_metadata(), "F32"),
            (small, byte_level_metadata(pre="llama-bpe"), "Q8_0"),
            (small | {"vocab_size": len(words["tokenizer.ggml.tokens"])}, words, "F16"),
        ]
        self._makers = []
        for config, tokenizer, qtype in sizes:
            options = {"config": config, "tokenizer": tokenizer, "qtype": qtype}
            self._seeds.append(write_gguf_model(self._path, **options).read_bytes())
            self._makers.append(options)

    def run(self, rng):
        if rng.random() < 0.15:
            self._write_odd_values(rng)
        else:
            whole = rng.choice(self._seeds)
            # Behind the counts, and within names and types, which are a tenth of the header.
            head = rng.choice([24, 700, 20_000, len(whole)])
            data = damaged(rng, whole, head)
            if rng.random() < 0.2:
                count = rng.choice([2**64 - 1, 2**63, 2**40, 10**9, 10**6, 0])
                at = rng.choice([8, 16])
                data = data[:at] + struct.pack("<Q", count) + data[at + 8 :]
            self._path.write_bytes(data)
        use(open_checkpoint(self._path), rng)

    def _write_odd_values(self, rng):
        options = rng.choice(self._makers)
        metadata = {**options["tokenizer"]}
        keys = [
            *metadata,
            *("llama.context_length", "llama.block_count", "llama.attention.head_count"),
            *("llama.attention.head_count_kv", "llama.rope.freq_base", "general.alignment"),
            *("llama.rope.dimension_count", "llama.attention.layer_norm_rms_epsilon"),
            *("llama.rope.scaling.type", "llama.rope.scaling.factor", "split.count"),
            *("llama.expert_count", "llama.embedding_length", "tokenizer.ggml.add_bos_token"),
            *("llama.feed_forward_length", "llama.vocab_size", "general.architecture"),
        ]
        changes = {}
        for _ in range(rng.randint(1, 3)):
            changes[rng.choice(keys)] = _value(rng)
        write_gguf_model(self._path, **(options | {"tokenizer": {}}), metadata=metadata | changes)


def _value(rng):
    match rng.randrange(5):
        case 0:
            return rng.choice([n for n in NUMBERS if isinstance(n, int) and 0 <= n < 2**32])
        case 1:
            return rng.choice([n for n in NUMBERS if isinstance(n, float) and abs(n) < 1e38])
        case 2:
            return _encodable(rng.choice(TEXTS))
        case 3:
            return [_encodable(rng.choice(TEXTS)) for _ in range(rng.choice([1, 3, 270]))]
        case _:
            return rng.choice([True, False, None, [1, 2, 3], [0.5, -1.0], [2**31 - 1] * 270])


def _encodable(text):
    return text.encode("utf-8", "replace").decode()
