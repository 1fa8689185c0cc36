"""The targets by name; each is a class that makes its seeds in a directory and runs one case."""

from importlib import import_module

TARGETS = {
    "parquet": ("fuzzing.parquet", "Parquet"),
    "gguf": ("fuzzing.gguf", "Gguf"),
    "safetensors": ("fuzzing.safetensors", "Safetensors"),
    "tokenizer": ("fuzzing.tokenizer", "TokenizerFiles"),
    "row-template": ("fuzzing.templates", "RowTemplates"),
    "chat-template": ("fuzzing.templates", "ChatTemplates"),
    "messages": ("fuzzing.messages", "Messages"),
    "schemas": ("fuzzing.schemas", "Schemas"),
    "options": ("fuzzing.options", "Options"),
}
BAD = ("fuzzing.bad", "Bad")  # to test the driver with


def make(name, scratch):
    module, kind = BAD if name == "bad" else TARGETS[name]
    return getattr(import_module(module), kind)(scratch)
