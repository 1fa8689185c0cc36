"""From what the user calls a model to where it lies on this machine, fetched if need be."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from batchllm.errors import ModelError
from batchllm.models.fake_checkpoint import FAKE_MODEL
from batchllm.models.registered import (
    DEFAULT_MODEL,
    REGISTERED,
    RegisteredModel,
    default_cache_dir,
    find_registered,
    pull_registered,
)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Never pickles. Only the repository's top level: below it are other formats and precisions.
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja"]
_HUB_IGNORED = ["*/*"]


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A registered model and where it is; `path` is None until it has been pulled."""

    name: str
    path: Path | None
    num_bytes: int
    license: str
    is_default: bool


def resolve(
    name: str | None = None,
    cache_dir: Path | None = None,
    *,
    notify: Callable[[str], None] = lambda _: None,
) -> Path:
    """Find a model, downloading it where that is needed.

    Args:
        name: a model directory or `.gguf` file, a registered name, or a Hugging Face hub id
            (`owner/name`); None is the default model. A path that exists wins over the others.
        cache_dir: where registered models are kept; `default_cache_dir()` where None.
        notify: told, in a sentence, before something is downloaded.

    Raises:
        ModelError: no such model, or it cannot be had; one line that says what to do.
    """
    name = DEFAULT_MODEL if name is None else name
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError, ValueError):  # no file can have such a name, or no such user
        raise ModelError(f"no model {name!r}: it cannot be a path") from None
    if name in REGISTERED:
        model = REGISTERED[name]
        if found := find_registered(model, cache_dir):
            return found
        notify(f"downloading model {name} ({model.num_bytes / 1e6:.0f} MB) to {cache_dir}")
        return pull_registered(model, cache_dir)
    if name.endswith(".gguf") or name.startswith((".", "/", "~")):
        raise ModelError(f"{name}: no such file or directory")
    if _HUB_ID.fullmatch(name):
        notify(f"looking for model {name} on the Hugging Face hub")
        return _from_hub(name)
    names = [*REGISTERED, FAKE_MODEL]
    near = difflib.get_close_matches(name, names, 1)
    raise ModelError(
        f"no model {name!r}: it is neither a path nor a hub id (owner/name); "
        + (f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(names)}")
    )


def installed(cache_dir: Path | None = None) -> list[InstalledModel]:
    """The registered models, the default first, and which of them are on this machine."""
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir

    def state(model: RegisteredModel) -> InstalledModel:
        return InstalledModel(
            name=model.name,
            path=find_registered(model, cache_dir),
            num_bytes=model.num_bytes,
            license=model.license,
            is_default=model.name == DEFAULT_MODEL,
        )

    return sorted(map(state, REGISTERED.values()), key=lambda m: not m.is_default)


def _from_hub(repo_id: str) -> Path:
    """Bring a repository's config, tokenizer and safetensors into the hub's own cache."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        path = Path(
            huggingface_hub.snapshot_download(
                repo_id, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED
            )
        )
    except errors.GatedRepoError:
        raise ModelError(
            f"{repo_id}: access needs the owners' consent; ask for it on the model's page and "
            "log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{repo_id}: no such model on the hub (or it is private: log in with `hf auth login`)"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise ModelError(
            f"{repo_id}: not in the hub cache, and the hub cannot be reached; check the connection "
            "and HF_HUB_OFFLINE, or give the path of a local copy"
        ) from None
    except Exception as error:  # the network can fail in many ways, by the client's version
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{repo_id}: cannot be downloaded: {first}") from None
    if not any(path.glob("*.safetensors")):
        raise ModelError(f"{repo_id}: {_what_there_is(repo_id)}")
    return path


def _what_there_is(repo_id: str) -> str:
    """Why a repository without safetensors will not do."""
    import huggingface_hub

    try:
        names = huggingface_hub.HfApi().list_repo_files(repo_id)
    except Exception:  # offline: all that is known is that they are not here
        names = []
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return (
            f"has GGUF files only; download one (`hf download {repo_id} {ggufs[0]}`) "
            "and give its path"
        )
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return "has pickled weights only, which can run any code and are not loaded"
    return "has no safetensors weights"
