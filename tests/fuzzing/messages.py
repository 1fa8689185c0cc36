"""Cells of a messages column: JSON text of every kind, and lists of structs."""

import json

import pyarrow as pa
from builders import CHATML, tiny_tokenizer

from batchllm.text.messages import parse_messages
from batchllm.text.prompts import PromptBuilder, PromptSpec
from fuzzing.mutate import json_bytes, mutated, odd
from fuzzing.texts import check_rows

_TOOLS = (
    "{% for m in messages %}{{ m.role }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}"
    "{% endfor %}{% endif %}{% endfor %}"
)
_SEED = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
    {"role": "tool", "content": "3", "name": "f"},
]


class Messages:
    """Damage to a conversation, as a value and as text in a column."""

    def __init__(self, scratch):
        specs = [PromptSpec(messages_column="m"), PromptSpec(messages_column="m", system="s")]
        self._builders = [
            PromptBuilder(spec, tiny_tokenizer(chat_template=template), 300)
            for spec in specs
            for template in (CHATML, _TOOLS)
        ]

    def run(self, rng):
        trees = [mutated(rng, _SEED) if rng.random() < 0.9 else odd(rng) for _ in range(4)]
        try:
            parse_messages(trees[0])
        except ValueError as error:
            assert "\n" not in str(error)
        cells = []
        for tree in trees:
            data = json_bytes(rng, tree) if isinstance(tree, dict | list) else json.dumps(tree)
            cells.append(data.encode() if isinstance(data, str) else data)
        # Cells that are no UTF-8 are what Parquet files can hold.
        column = pa.array(cells, pa.binary()).view(pa.string())
        builder = rng.choice(self._builders)
        table = pa.table({"m": column})
        check_rows(builder.build(table))
        builder.keys(table)
