"""From rows to token ids and back: prompts, chat templates, tokenizers."""
