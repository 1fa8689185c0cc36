"""The default model's tokenizer and chat template against transformers' reading of the same file.

transformers does not know this file's pre-tokenizer (`smollm`) and takes GPT-2's. Ids were held
against llama.cpp itself (377 texts, all equal) when this was written; here, transformers is given
the pre-tokenizer of the model's own tokenizer.json, and a few of llama.cpp's ids are pinned.
"""

import copy
import random

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from batchllm.models import locate
from batchllm.models.checkpoint import open_checkpoint
from batchllm.text.chat import ChatTemplate
from batchllm.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TEXTS = [
    "",
    " ",
    "Hello  world   foo",
    "I'll don't we're I'M",
    "tabs\t\tand\r\nnewlines\r\n\r\n",
    "emoji 😀👨‍👩‍👧‍👦🇨🇭 end",
    "日本語のテキスト、中国語 한국어 ไทย क्षेत्र",
    "Ελληνικά кириллица עברית العربية",
    "def f(x):\n    return x+1\n\n\n",
    "3.14159 1,000,000 0x1F 2024-01-01T12:34:56Z",
    "a\u00a0b\u2003c\u200bd\u3000e \ufeff",
    "½ a½ ² ٣٤ ① Ⅻ \U0001d7ce",
    "x\n\n1. one\n2. two    12   34",
    "<|im_start|>user\n12</s>hi<|im_end|>",
    "<|endoftext|><repo_name>foo<reponame>",
    "\x00\x01\x7f",
    "A" * 500,
    "1234567890" * 50,
]

# What llama.cpp makes of the file, where transformers, left alone, differs.
FROM_LLAMA_CPP = {
    "a  1": [81, 256, 33],
    "x\n\n1. one\n2. two": [104, 1116, 33, 30, 582, 198, 34, 30, 827],
    "\n\n1. x": [1116, 33, 30, 1792],
}


def random_texts(count):
    generator = random.Random(0)
    alphabet = "aZ é1½\n\t  .,'\"<|>日😀ß\u00a0\u2028\u3000\u06271290_"
    lengths = (generator.randint(1, 80) for _ in range(count))
    return ["".join(generator.choice(alphabet) for _ in range(length)) for length in lengths]


@pytest.fixture(scope="module")
def path():
    return locate.resolve(None)


@pytest.fixture(scope="module")
def ours(path):
    return open_checkpoint(path).tokenizer()


@pytest.fixture(scope="module")
def theirs(path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def theirs_as_published(theirs):
    tokenizer = copy.deepcopy(theirs)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def encode(tokenizer, texts, special=True):
    return [ids.tolist() for ids in tokenizer.encode_batch(texts, add_special_tokens=special)]


def test_texts_without_digits_equal_transformers_as_it_is(ours, theirs):
    texts = [t for t in TEXTS + random_texts(500) if not any(c.isnumeric() for c in t)]
    assert len(texts) > 20
    assert encode(ours, texts) == [theirs(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("special", [True, False])
def test_all_texts_equal_the_published_pre_tokenizer(ours, theirs_as_published, special):
    texts = TEXTS + random_texts(1000)
    expected = [
        theirs_as_published(text, add_special_tokens=special)["input_ids"] for text in texts
    ]
    assert encode(ours, texts, special) == expected


def test_transformers_is_wrong_where_llama_cpp_says_so(ours, theirs):
    texts = list(FROM_LLAMA_CPP)
    assert encode(ours, texts) == list(FROM_LLAMA_CPP.values())
    # Should transformers learn the pre-tokenizer, this fails, and the tests above can be simpler.
    assert [theirs(text)["input_ids"] for text in texts] != list(FROM_LLAMA_CPP.values())


def test_decoding_equals_transformers(ours, theirs):
    generator = random.Random(1)
    sequences = encode(ours, TEXTS) + [
        [generator.randrange(ours.vocab_size) for _ in range(50)] for _ in range(50)
    ]
    assert ours.decode_batch([np.array(ids, np.int32) for ids in sequences]) == [
        theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in sequences
    ]


def test_special_tokens(ours, theirs):
    assert ours.vocab_size == len(theirs) == 49152
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    assert theirs.eos_token_id in ours.eos_token_ids
    assert ours.eos_token_ids == (0, 2)


def message(role, content):
    return {"role": role, "content": content}


CONVERSATIONS = [
    [message("user", "Hi")],
    [message("system", "Be brief."), message("user", "Hi")],
    [message("user", "a"), message("assistant", "b"), message("user", "c")],
    [message("user", "  spaces \n\n and <|im_end|> inside {{ not_jinja }} ")],
    [message("assistant", "first")],
    [message("user", "日本語 😀"), message("system", "late system")],
    [message("user", "") | {"name": None}],
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_template_equals_transformers(ours, theirs, conversation, add_generation_prompt):
    template = ChatTemplate(ours.chat_template, ours.bos_token, ours.eos_token)
    expected = theirs.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert template.render(conversation, add_generation_prompt) == expected
    if conversation[0]["role"] != "system":
        assert "You are a helpful AI assistant named SmolLM" in expected


def test_a_directory_saved_by_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    texts = TEXTS + random_texts(200)
    assert encode(ours, texts) == [theirs(text)["input_ids"] for text in texts]
    assert ours.chat_template == theirs.chat_template
    assert (ours.bos_token, ours.eos_token_ids) == ("<|im_start|>", (2,))
