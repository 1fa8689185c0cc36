"""The command line in this process, on a small table."""

import pyarrow.parquet as pq
from typer.testing import CliRunner

from batchllm.cli import app

ROWS = 50  # of the fixture `table`


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run(source, output, model, *extra):
    words = ("--kv-memory", "16M", "--max-tokens", 6, "--quiet")
    if not any(str(e).startswith(("--template", "--messages", "--token-ids")) for e in extra):
        words = ("--prompt-column", "text", *words)
    return invoke("run", source, output, "--model", model, *words, *extra)


def answers(path):
    return pq.read_table(path)["answer"].to_pylist()
