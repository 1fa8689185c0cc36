"""A tokenizer for models that have none: text is token ids in digits, spaces between them."""

from collections.abc import Sequence

import tokenizers
from tokenizers import models, pre_tokenizers

from batchllm.text.tokenizer import Tokenizer


def id_tokenizer(vocab_size: int, eos_token_ids: Sequence[int]) -> Tokenizer:
    """`[17, 4, 90]` is `17 4 90`, both ways; no id is special, so an answer shows all it has."""
    backend = tokenizers.Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(
        backend, bos_token=None, eos_token=None, eos_token_ids=eos_token_ids, chat_template=None
    )
