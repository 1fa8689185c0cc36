"""What makes a model's prompts, and how long they may be; needs its tokenizer, not its weights."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchllm.config import EngineConfig
from batchllm.errors import UsageError
from batchllm.models.checkpoint import Checkpoint
from batchllm.models.dummy_checkpoint import DummyCheckpoint
from batchllm.text.field_order import ColumnRules
from batchllm.text.prompts import PromptBuilder, PromptSpec
from batchllm.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


def tables_of(
    prompts: Sequence[Prompt], chat: bool | None
) -> Iterator[tuple[NDArray[np.int64], pa.Table, PromptSpec]]:
    """A list's texts and its token ids, each as a table: (places in the list, table, its spec)."""
    texts = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
    ids = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
    for places, kind, spec in (
        (texts, pa.string(), PromptSpec(prompt_column="prompt", chat=chat)),
        (ids, pa.list_(pa.int64()), PromptSpec(token_ids_column="prompt")),
    ):
        if places:
            table = pa.table({"prompt": pa.array([prompts[i] for i in places], kind)})
            yield np.array(places), table, spec


def table_of(conversations: Sequence[Sequence[dict[str, str]]]) -> pa.Table:
    """Conversations as a column `messages`."""
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    return pa.table({"messages": pa.array(list(conversations), kind)})


def choose_max_model_len(checkpoint: Checkpoint, config: EngineConfig) -> int:
    """Tokens of prompt and answer together, by the config or as the model was made for.

    Raises:
        UsageError: the config asks for more than the model was made for.
    """
    longest = checkpoint.config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        raise UsageError(
            f"max_model_len is {config.max_model_len:,}; the model was made for {longest:,}"
        )
    return config.max_model_len or longest


def prompt_tokenizer(checkpoint: Checkpoint, spec: PromptSpec) -> Tokenizer:
    """What makes the prompts: the model's own, but for text to a model that has none.

    Raises:
        UsageError: there is text, and nothing to tokenize it with.
    """
    if isinstance(checkpoint, DummyCheckpoint) and spec.token_ids_column is None:
        return checkpoint.text_tokenizer()
    return checkpoint.tokenizer()


def prompt_builder(
    checkpoint: Checkpoint,
    config: EngineConfig,
    spec: PromptSpec,
    field_rules: ColumnRules | None = None,
) -> PromptBuilder:
    """What makes a model's prompts; needs no weights.

    `field_rules` is what was learned for `spec.reorder_fields`, from the whole of the input.

    Raises:
        UsageError: the spec wants a chat template or a tokenizer and the model has none, or
            `max_model_len` is more than the model was made for.
    """
    return PromptBuilder(
        spec,
        prompt_tokenizer(checkpoint, spec),
        choose_max_model_len(checkpoint, config),
        vocab_size=checkpoint.config.vocab_size,
        field_rules=field_rules,
    )
