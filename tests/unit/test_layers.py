"""Imports run one way, and the light parts stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "batchllm"

# What each part may import; a part not named here may import anything of ours.
ALLOWED = {
    "errors": set(),
    "request": {"errors"},
    "config": {"errors"},
    "metrics": set(),
    "least_squares": set(),
    "flashinfer_library": {"errors"},
    "prefix": {"errors", "request", "prefix"},
    "cgroup": set(),
    "cpus": {"cgroup"},
    "child": {"errors"},
    "cache": {"errors", "cgroup", "cache"},
    "scheduler": {"errors", "request", "prefix", "cache", "scheduler"},
    "engine": {"errors", "request", "prefix", "cache", "scheduler"},
    "simulate": {
        *("errors", "request", "cpus", "prefix", "cache", "scheduler", "models"),
        *("least_squares", "native", "simulate"),
    },
    "progress": {"prefix", "scheduler"},
    "io": {"errors", "request", "io"},
    "text": {"errors", "request", "prefix", "text"},
    "models": {"errors", "request", "text", "native", "flashinfer_library", "models"},
    "native": {"native"},
    "attention": {
        *("errors", "request", "scheduler", "models", "native", "flashinfer_library"),
        *("least_squares", "attention", "runner"),
    },
    "sampling": {"errors", "request", "scheduler", "flashinfer_library", "sampling"},
    "runner": {
        *("errors", "request", "config", "cpus", "child", "prefix", "cache", "scheduler"),
        *("engine", "attention", "models", "native", "flashinfer_library", "sampling"),
        *("simulate", "runner"),
    },
    "report": {
        *("errors", "request", "prefix", "cache", "scheduler", "simulate", "text", "progress"),
        "report",
    },
    "outputs": {"errors", "request", "metrics", "prefix", "scheduler", "text"},
    "prompting": {"errors", "config", "models", "text"},
    "watch": {"prefix", "request", "scheduler"},
    "planning": {"request", "prefix", "scheduler", "simulate"},
    "replica_messages": {"child", "config", "metrics", "models", "request", "runner"},
    "replicas": {
        *("errors", "request", "config", "metrics", "prefix", "scheduler", "simulate"),
        *("child", "models", "runner", "text", "watch", "replica_messages"),
    },
    "integrations": {
        *("errors", "request", "config", "metrics", "cpus", "prefix", "io", "models", "runner"),
        *("simulate", "text", "prompting", "windows", "api", "integrations"),
    },
    "api": {
        "watch",
        *("errors", "request", "config", "metrics", "engine", "prefix", "cache"),
        *("outputs", "planning", "prompting", "describe", "replica_messages", "replicas"),
        *("scheduler", "simulate", "runner", "models", "text", "io"),
    },
    "polars": {"errors", "integrations"},
    "datasets": {"errors", "integrations"},
    "dask": {"errors", "integrations", "io", "text"},
    "ray": {"errors", "integrations"},
    "spark": {"errors", "prefix", "integrations"},
}
NO_TORCH = (
    "batchllm",
    "batchllm.cli",
    "batchllm.engine",
    "batchllm.prefix.plan",
    "batchllm.scheduler.scheduler",
    "batchllm.simulate.simulator",
    "batchllm.cache.block_pool",
    "batchllm.runner.fake_runner",
    "batchllm.attention.cuda_plan",
    "batchllm.attention.step_costs",
    "batchllm.runner.choose_device",
    "batchllm.runner.dtype",
    "batchllm.runner.threads",
    "batchllm.attention.flashinfer_arrays",
    "batchllm.cache.memory",
    "batchllm.io.output",
    "batchllm.text.prompts",
    "batchllm.prompt_worker",
    "batchllm.child",
    "batchllm.replicas",
    "batchllm.models.parallel",
    "batchllm.prefix.divide",
    "batchllm.windows",
    "batchllm.models.checkpoint",
    "batchllm.models.locate",
    "batchllm.report.plan",
    "batchllm.report.simulation",
    "batchllm.integrations.passes",
    "batchllm.api",
    "batchllm.job",
)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module


def parts():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_lies_below_it(part):
    seen = 0
    for name, path in parts():
        if name != part:
            continue
        seen += 1
        for module in imports(path):
            if module.startswith("batchllm."):
                target = module.split(".")[1]
                assert target in ALLOWED[part], f"{path} imports {module}"
    assert seen


def test_nothing_imports_the_command_line():
    for name, path in parts():
        assert name == "cli" or "batchllm.cli" not in imports(path)


def test_the_package_imports_no_oracle():
    for _, path in parts():
        assert not any(module.split(".")[0] == "transformers" for module in imports(path)), path


@pytest.mark.parametrize("module", NO_TORCH)
def test_import_is_light(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_fake_does_without_torch():
    code = "import sys, batchllm; batchllm.LLM('fake', kv_memory=1 << 20).generate(['a']); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_resolve():
    import batchllm

    assert batchllm.SamplingParams(max_tokens=3).max_tokens == 3
    assert set(batchllm.__all__) <= set(dir(batchllm))
    with pytest.raises(AttributeError, match="no attribute 'LLMM'"):
        batchllm.LLMM  # noqa: B018
