"""Damaged model directories in the Hugging Face layout."""

import json
import shutil
import struct

from builders import tiny_config, write_safetensors_model

from batchllm.models.checkpoint import open_checkpoint
from fuzzing.models import use
from fuzzing.mutate import damaged, json_bytes, mutated, odd

_PLACES = ["../outside.safetensors", "/etc/passwd", ".", "..", "a/b", "\0", "", "model.bin", "\n"]


class Safetensors:
    """One file of a good directory is made bad: a header, a config, an index, a link."""

    def __init__(self, scratch):
        self._model = scratch / "model"
        config = tiny_config(num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=8)
        self._good = [scratch / "one", scratch / "three"]
        write_safetensors_model(self._good[0], config=config)
        write_safetensors_model(self._good[1], config=config, shards=3)
        for good in self._good:
            (good / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
        (scratch / "outside.safetensors").write_bytes(b"\0" * 100)

    def run(self, rng):
        shutil.rmtree(self._model, ignore_errors=True)
        shutil.copytree(rng.choice(self._good), self._model)
        kinds = [self._header, self._header, self._config, self._config, self._index, self._link]
        rng.choice(kinds)(rng)
        use(open_checkpoint(self._model), rng)

    def _header(self, rng):
        path = rng.choice(sorted(self._model.glob("*.safetensors")))
        whole = path.read_bytes()
        length = int.from_bytes(whole[:8], "little")
        if rng.random() < 0.4:
            path.write_bytes(damaged(rng, whole, rng.choice([8, 8 + length, None])))
            return
        header = json.loads(whole[8 : 8 + length])
        for name in rng.sample(sorted(header), k=min(2, len(header))):
            if isinstance(header[name], dict) and rng.random() < 0.7:
                key = rng.choice(["dtype", "shape", "data_offsets"])
                header[name][key] = rng.choice([odd(rng), [odd(rng), odd(rng)], [2**62, 2**62]])
        text = json_bytes(rng, mutated(rng, header) if rng.random() < 0.5 else header)
        told = len(text) if rng.random() < 0.9 else rng.choice([0, 2**40, 2**64 - 1, 5])
        path.write_bytes(struct.pack("<Q", told) + text + whole[8 + length :])

    def _config(self, rng):
        names = ["config.json", "generation_config.json", "tokenizer_config.json"]
        path = self._model / rng.choice(names)
        tree = json.loads(path.read_text())
        extra = {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1}}
        if rng.random() < 0.3:
            tree |= rng.choice([extra, {"quantization_config": odd(rng)}, {"dtype": odd(rng)}])
        path.write_bytes(json_bytes(rng, mutated(rng, tree)))

    def _index(self, rng):
        path = self._model / "model.safetensors.index.json"
        tree = {"weight_map": {"model.norm.weight": rng.choice(_PLACES)}}
        if path.is_file() and rng.random() < 0.7:
            tree = json.loads(path.read_text())
            names = tree["weight_map"]
            names[rng.choice(sorted(names))] = rng.choice([*_PLACES, odd(rng)])
        path.write_bytes(json_bytes(rng, tree))
        if rng.random() < 0.5:
            (self._model / "model.safetensors").unlink(missing_ok=True)

    def _link(self, rng):
        path = rng.choice(sorted(self._model.iterdir()))
        path.unlink()
        match rng.randrange(4):
            case 0:
                path.symlink_to(rng.choice(["/etc/passwd", path.name, "/dev/null", "nowhere"]))
            case 1:
                path.mkdir()
            case 2:
                path.write_bytes(b"")
            case 3:
                path.rename(path.with_suffix(".bin")) if path.exists() else path.with_suffix(
                    ".bin"
                ).write_bytes(b"\x80\x04")
