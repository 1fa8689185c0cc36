"""A model with one token of NaNs: who reads it fails, and nobody else notices."""

import numpy as np
import pytest
from builders import byte_level_tokens, random_weights, tiny_config, write_safetensors_model

from batchllm import LLM, SamplingParams

BAD = "~"
GOOD_ROWS = [f"the same beginning, number {i % 7} {'x' * (i % 5)}" for i in range(30)] + ["other"]
BAD_ROWS = [
    *[f"the same beginning, number {i % 7} {BAD}{'x' * i}" for i in range(9)],
    *[f"{BAD} a beginning of their own, number {i % 5}" for i in range(8)],  # some are duplicates
    BAD,
]
PARAMS = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config(max_position_embeddings=512, tie_word_embeddings=False)
    weights = random_weights(config)
    weights["model.embed_tokens.weight"][byte_level_tokens().index(BAD)] = np.nan
    weights["lm_head.weight"][byte_level_tokens().index(BAD)] = 0  # so it is not sampled either
    directory = tmp_path_factory.mktemp("models") / "nan"
    return write_safetensors_model(directory, config=config, weights=weights)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bfloat16"},
        {"attention_backend": "torch"},
        {"attention_backend": "reference"},
        {"quantization": "int8"},
        {"quantization": "int8", "attention_backend": "torch"},
        {"policy": "dfs", "max_num_batched_tokens": 7},
        {"policy": "streaming", "max_num_batched_tokens": 30},
        {"sharing": False},
        {"kv_memory": 60_000, "block_size": 4},
        {"kv_memory": 120_000},
    ],
)
def test_rows_that_read_nans_fail_and_the_others_answer_as_without_them(model, options):
    llm = LLM(model, **({"kv_memory": 64 << 20} | options))
    alone = [o.text for o in llm.generate(GOOD_ROWS, PARAMS)]
    rows = sorted([(text, True) for text in GOOD_ROWS] + [(text, False) for text in BAD_ROWS])
    outputs = llm.generate([text for text, _ in rows], PARAMS)
    assert None not in alone
    answers = dict(zip(GOOD_ROWS, alone, strict=True))
    for (text, is_good), output in zip(rows, outputs, strict=True):
        if is_good:
            assert output.text == answers[text]
            continue
        assert output.text is None and output.finish_reason == "error"
        assert output.error.code == "nan_logits" and "answer token 1 " in output.error.message
    assert llm.metrics.failed == len(BAD_ROWS)
    # Blocks that held NaNs have new owners now.
    assert [o.text for o in llm.generate(GOOD_ROWS, PARAMS)] == alone
