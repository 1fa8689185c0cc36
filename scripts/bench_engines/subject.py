"""Which model the ladder runs: the default one, or random weights of a known model's shape.

Every engine gets the same weights: ours the default model's GGUF and the peers what was exported
from it, or all of them one directory that export_shape.py wrote.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench_engines.bound import SMOLLM2_135M, ModelShape
from bench_engines.engines import BENCH, FOLDER, BenchError, Engine, Weights, run_json

from batchllm.errors import UsageError
from batchllm.models.shapes import get_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model; `model_shape` names it where its weights are random."""

    model_shape: str | None
    sizes: ModelShape
    weights: Weights

    def make(self, chosen: Iterable[Engine]) -> None:
        """Writes random weights that any of these engines reads, unless they are there."""
        if self.model_shape is None:
            return
        plain, rounded = self.weights.peers, self.weights.peers_int8
        wanted = {engine.model for engine in chosen}
        if wanted & {plain, rounded}:  # the one is rounded to the other
            _write(plain, "export_shape.py", self.model_shape)
        if rounded in wanted:
            _write(rounded, "export_int8.py", str(plain))


def _write(path: Path, script: str, source: str) -> None:
    if not (path / "config.json").exists():
        run_json([sys.executable, str(FOLDER / script), source, str(path)])


def default_subject(model: Path) -> Subject:
    """The default model; `model` is the file that ours reads."""
    weights = Weights(ours=model, peers=BENCH / "model", peers_int8=BENCH / "model-int8")
    return Subject(model_shape=None, sizes=SMOLLM2_135M, weights=weights)


def shape_subject(name: str) -> Subject:
    """Random weights of a shape that batchllm knows.

    Raises:
        BenchError: it knows none of that name.
    """
    try:
        config = get_config(name)
    except UsageError as error:
        raise BenchError(str(error)) from None
    path = BENCH / "shapes" / name
    sizes = ModelShape(
        layers=config.num_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        q_heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
    )
    weights = Weights(ours=path, peers=path, peers_int8=path.with_name(f"{name}-int8"))
    return Subject(model_shape=name, sizes=sizes, weights=weights)
