"""A model on disk, whatever its format: config and tokenizer at once, weights one at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from batchllm.errors import ModelError, UsageError
from batchllm.models.config import ModelConfig
from batchllm.models.dummy_checkpoint import DUMMY, DummyCheckpoint
from batchllm.models.fake_checkpoint import FAKE_MODEL, FakeCheckpoint
from batchllm.models.gguf_checkpoint import GGUFCheckpoint
from batchllm.models.layout import Cut, whole
from batchllm.models.locate import resolve
from batchllm.models.safetensors_checkpoint import SafetensorsCheckpoint
from batchllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

LOAD_FORMATS = ("auto", DUMMY)


class Checkpoint(Protocol):
    """An opened checkpoint: its headers are read and checked, its weights are not loaded."""

    path: Path
    config: ModelConfig

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, built when it is first asked for.

        That takes a few hundred milliseconds for a large vocabulary, and all share it.
        """

    def weights(
        self, dtype: "torch.dtype | None" = None, cut: Cut = whole
    ) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield every weight once, in no particular order, as (canonical name, tensor).

        Names are Hugging Face's, as `layout.expected_tensors` lists them. Each tensor is its own
        memory and is converted as it comes, so a model is never held twice.

        Args:
            dtype: what to convert to. None leaves safetensors as stored, and gives float32 for
                GGUF, whose blocks have to be dequantised to something.
            cut: says which part of each is wanted.
        """

    def identity(self) -> dict[str, str]:
        """What tells this model from another, cheaply and wherever it lies."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What another process needs to open the same model; as `open_model` is called."""

    name: str | None
    load_format: str = "auto"
    model_shape: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "ModelSource":
        """Of an opened one."""
        if isinstance(checkpoint, DummyCheckpoint):
            return cls(None, DUMMY, checkpoint.shape)
        return cls(str(checkpoint.path))

    def open(self) -> Checkpoint:
        """Open it."""
        return open_model(self.name, load_format=self.load_format, model_shape=self.model_shape)


def open_model(
    name: str | None = None,
    *,
    load_format: str = "auto",
    model_shape: str | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> Checkpoint:
    """Open what a user calls a model, fetching it if need be (see `resolve`); or `fake`.

    Args:
        name: see `resolve`.
        load_format: "dummy" for random weights; "auto" goes by what is there.
        model_shape: what has random weights, by its name in `shapes.CONFIGS`.
        notify: told, in a sentence, before something is downloaded.

    Raises:
        ModelError: no such model, or it cannot be had or run; one line that says what to do.
        UsageError: the arguments make no sense together.
    """
    if load_format not in LOAD_FORMATS:
        raise UsageError(f"load format is {load_format!r}; choose one of {', '.join(LOAD_FORMATS)}")
    if load_format == DUMMY:
        if name is not None:
            raise UsageError(
                f"load format {DUMMY} makes a model of a model shape alone, but model {name!r} is "
                "given; leave out one of the two"
            )
        return DummyCheckpoint.of(model_shape)
    if model_shape is not None:
        raise UsageError(
            f"model shape {model_shape!r} is given, which is for load format {DUMMY}; "
            "leave it out, or load that"
        )
    if name == FAKE_MODEL and not Path(name).exists():
        return FakeCheckpoint()
    return open_checkpoint(resolve(name, notify=notify))


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model directory (safetensors), a `.gguf` file, or a directory with one of them.

    Raises:
        ModelError: nothing there, or not a model that batchllm can run; one line.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            raise ModelError(f"{path}: give the directory, which has the config and tokenizer too")
        return GGUFCheckpoint(path)
    if not path.is_dir():
        raise ModelError(f"{path}: no such file or directory")
    if (path / "config.json").is_file():
        return SafetensorsCheckpoint(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return GGUFCheckpoint(files[0])
    if files:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"{path}: has {len(files)} GGUF files, give the path of one: {names}")
    raise ModelError(f"{path}: config.json is missing, and there is no GGUF file")
