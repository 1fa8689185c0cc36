"""Options as Python passes them and as the command line does."""

import pyarrow as pa
import pyarrow.parquet as pq
from typer.testing import CliRunner

from batchllm.cli import app
from batchllm.config import EngineConfig, parse_size
from batchllm.errors import BatchLLMError
from batchllm.job import JobConfig
from batchllm.request import SamplingParams
from batchllm.text.prompts import PromptSpec
from fuzzing.mutate import NUMBERS, TEXTS

_ENGINE = [
    *("dtype", "quantization", "policy", "sharing", "attention_backend", "threads", "kv_memory"),
    *("tensor_parallel_size", "data_parallel_size", "machine_share"),
    *("max_model_len", "block_size", "max_num_batched_tokens", "max_num_seqs", "nothing", ""),
]
_FLAGS = [
    *("--prompt-column", "--messages-column", "--token-ids-column", "--template", "--system"),
    *("--output-column", "--max-tokens", "--max-tokens-column", "--temperature", "--top-p"),
    *("--top-k", "--seed", "--dtype", "--quantization", "--policy", "--threads", "--kv-memory"),
    *("--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--window-rows", "--limit"),
    *("--max-errors", "--summary", "--reorder-fields", "--chat", "--no-chat", "--no-sharing"),
    *("--ignore-eos", "--quiet", "-q", "--nonsense", "--machine", "--model-shape", "--simulate"),
    *("--json", "--help", "--calibrate", "--load-format"),
    *("--tensor-parallel-size", "--data-parallel-size"),
]
_SWITCHES = {
    *("--reorder-fields", "--chat", "--no-chat", "--no-sharing", "--ignore-eos", "--quiet", "-q"),
    *("--simulate", "--json", "--help", "--calibrate"),
}


class Options:
    """Everything that is refused before a model is opened; there is none under the name given."""

    def __init__(self, scratch):
        self._scratch = scratch
        self._input = scratch / "in.parquet"
        pq.write_table(pa.table({"t": ["a"], "n": [1]}), self._input)

    def run(self, rng):
        rng.choice([self._python, self._command_line])(rng)

    def _python(self, rng):
        values = [*NUMBERS, *TEXTS, "auto", "dfs", "float32", None, True]
        match rng.randrange(5):
            case 0:
                options = {name: _like(rng, name, values) for name in rng.sample(_ENGINE, k=2)}
                EngineConfig.from_options(**options)
            case 1:
                number = rng.choice(["max_tokens", "temperature", "top_p", "top_k", "seed"])
                SamplingParams(**{number: rng.choice(NUMBERS)})
            case 2:
                parse_size(_size(rng))
            case 3:
                name = rng.choice(["window_rows", "limit", "max_errors"])
                prompt = PromptSpec(prompt_column="t")
                JobConfig(input="a", output="b", prompt=prompt, **{name: rng.choice(NUMBERS)})
            case 4:
                names = ["prompt_column", "messages_column", "token_ids_column", "template"]
                names += ["system", "chat", "max_tokens_column", "reorder_fields"]
                chosen = rng.sample(names, k=rng.randint(0, 3))
                PromptSpec(
                    **{
                        name: rng.choice([True, False])
                        if name in ("chat", "reorder_fields")
                        else rng.choice(TEXTS)
                        for name in chosen
                    }
                )

    def _command_line(self, rng):
        arguments = [rng.choice(["run", "run", "run", "plan", "plan", "bench", "inspect", "what"])]
        places = [self._input, self._scratch, self._scratch / "none", "*.parquet", *TEXTS]
        arguments += [rng.choice(places) for _ in range(rng.choice([0, 1, 2, 2, 2]))]
        if rng.random() < 0.5:
            arguments += ["--prompt-column", "t"]
        for flag in rng.sample(_FLAGS, k=rng.randint(0, 4)):
            arguments.append(flag)
            if flag not in _SWITCHES:
                arguments.append(rng.choice([*NUMBERS, *TEXTS, _size(rng), "t", "n", "answer"]))
        arguments += ["--model", rng.choice(["./none", str(self._scratch / "none.gguf"), *TEXTS])]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code in (0, 1, 2), result.exit_code
        if result.exit_code:
            raise RefusedError(result.stderr.strip().splitlines()[-1:])


class RefusedError(BatchLLMError):
    """The command said no."""

    def __init__(self, lines):
        super().__init__(" ".join(lines)[:500].replace("\x1b", "") or "usage")


def _size(rng):
    text = rng.choice(["1", "4", "0", "9" * 400, "1.5", "-1", "", "1e5", "٣"])
    return text + rng.choice(["", "G", "GiB", "k", "kb", "X", "\n", " t"])


def _like(rng, name, values):
    """A value of the type that the option has; types are what mypy is for."""
    if name in ("dtype", "policy", "attention_backend", "quantization"):
        return rng.choice([*TEXTS, "auto", "dfs", "float32", "int8"])
    if name == "sharing":
        return rng.choice([True, False])
    return rng.choice([n for n in NUMBERS if isinstance(n, int)]) if name else rng.choice(values)
