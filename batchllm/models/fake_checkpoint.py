"""`fake`: no model at all, for trying out a job and for tests of everything around one.

Its answers are letters drawn by a hash of the whole prompt, the same for the same prompt, and cost
next to nothing. Text is tokenized byte by byte.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from batchllm.errors import ModelError
from batchllm.models.config import ModelConfig
from batchllm.models.layout import Cut, whole
from batchllm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

FAKE_MODEL = "fake"
_END, _TURN = "<|end|>", "<|turn|>"
_SPACE = "Ġ"  # as byte-level vocabularies write it
_ALPHABET = [_END, _TURN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|turn|>' + message['role'] + '\n' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)


class FakeCheckpoint:
    """Opened without a file (see `Checkpoint`).

    `answer_token_ids` is what answers are drawn from: letters, spaces, and one end in 32.
    """

    def __init__(self) -> None:
        self.path = Path(FAKE_MODEL)
        self.config = ModelConfig(
            architecture="LlamaForCausalLM",
            vocab_size=len(_ALPHABET),
            hidden_size=64,
            intermediate_size=64,
            num_layers=1,
            num_heads=4,
            num_kv_heads=1,
            head_dim=16,
            rms_norm_eps=1e-5,
            rope_theta=10_000.0,
            rope_scaling=None,
            max_position_embeddings=32_768,
            tie_word_embeddings=True,
            attention_bias=False,
            attention_output_bias=False,
            mlp_bias=False,
            dtype="float32",
            eos_token_ids=(_ALPHABET.index(_END),),
            bos_token_id=None,
        )
        drawn = [_END, *"abcdefghijklmnopqrstuvwxyz", *(5 * _SPACE)]
        self.answer_token_ids = [_ALPHABET.index(token) for token in drawn]

    def tokenizer(self) -> Tokenizer:
        vocabulary = {token: i for i, token in enumerate(_ALPHABET)}
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, special=True) for token in (_END, _TURN)])
        return Tokenizer(
            backend,
            bos_token=None,
            eos_token=_END,
            eos_token_ids=self.config.eos_token_ids,
            chat_template=_CHAT_TEMPLATE,
        )

    def weights(
        self, dtype: "torch.dtype | None" = None, cut: Cut = whole
    ) -> Iterator[tuple[str, "torch.Tensor"]]:
        """It has none.

        Raises:
            ModelError: always.
        """
        raise ModelError(f"{FAKE_MODEL}: there are no weights")

    def identity(self) -> dict[str, str]:
        return {"format": FAKE_MODEL}
