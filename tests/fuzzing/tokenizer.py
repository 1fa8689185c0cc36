"""Damaged tokenizer files, and texts through those that load."""

import json

import numpy as np
from builders import CHATML, byte_level_metadata, sentencepiece_metadata, tiny_backend
from tokenizers import models, normalizers, pre_tokenizers, processors

from batchllm.text.gguf_tokenizer import tokenizer_from_gguf
from batchllm.text.prompts import PromptBuilder, PromptSpec
from batchllm.text.tokenizer import Tokenizer
from fuzzing.mutate import json_bytes, mutated
from fuzzing.texts import check_rows, random_texts, table_of

_SPECS = [PromptSpec(prompt_column="t"), PromptSpec(prompt_column="t", chat=False)]


def _seeds():
    yield tiny_backend()
    yield tokenizer_from_gguf(byte_level_metadata())._backend
    yield tokenizer_from_gguf(sentencepiece_metadata())._backend
    backend = tiny_backend()
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    yield backend
    for model in (
        models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2}, unk_token="[UNK]"),
        models.Unigram([("<unk>", 0.0), ("a", -1.0), ("▁a", -2.0)], unk_id=0, byte_fallback=False),
        models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"),
    ):
        backend = tiny_backend()
        backend.model = model
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        yield backend


class TokenizerFiles:
    """`tokenizer.json` and `tokenizer_config.json`, mutated as trees or as text."""

    def __init__(self, scratch):
        self._folder = scratch
        self._trees = [json.loads(backend.to_str()) for backend in _seeds()]
        for tree in self._trees:  # small, so that mutations meet the structure
            added = tree["added_tokens"]
            tree["added_tokens"] = added[:6]

    def run(self, rng):
        tree = rng.choice(self._trees)
        config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": CHATML}
        if rng.random() < 0.3:
            config["add_bos_token"] = rng.choice([True, False, None, 3])
        if rng.random() < 0.8:
            tree = self._changed(rng, tree)
        else:
            config = mutated(rng, config)
        (self._folder / "tokenizer.json").write_bytes(json_bytes(rng, tree))
        (self._folder / "tokenizer_config.json").write_bytes(json_bytes(rng, config))
        tokenizer = Tokenizer.from_directory(self._folder)
        _ = tokenizer.fingerprint, tokenizer.vocab_size
        texts = random_texts(rng)
        for spec in _SPECS:
            builder = PromptBuilder(spec, tokenizer, 500)
            check_rows(builder.build(table_of([*texts, "a" * 200 + " b", "a" * 200 + " c"])))
        ids = rng.choices([0, 1, 2, 5, max(0, tokenizer.vocab_size - 1), 2**31 - 1], k=6)
        tokenizer.decode_batch([np.array(ids, dtype=np.int32)])

    def _changed(self, rng, tree):
        """One part mutated, or another tokenizer's."""
        tree = json.loads(json.dumps(tree))
        part = rng.choice(
            ["normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens"]
        )
        if rng.random() < 0.3:
            tree[part] = rng.choice(self._trees)[part]
        if rng.random() < 0.8 and isinstance(tree[part], dict | list) and tree[part]:
            tree[part] = mutated(rng, tree[part])
            return tree
        return mutated(rng, tree)
