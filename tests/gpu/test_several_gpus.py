"""Processes that share a model on GPUs: NCCL as it is called here, and two against one."""

import pytest
import torch
from builders import tiny_config, write_safetensors_model
from process_checks import hard_limit

from batchllm import LLM, SamplingParams
from batchllm.runner.group import connect

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures(hard_limit.__name__)]


def test_a_group_of_one_in_steps_and_in_recordings(tmp_path):
    group = connect(0, 1, tmp_path / "meeting", "cuda")
    assert group.least(7) == 7
    x = torch.arange(6.0, device="cuda").view(2, 3)
    expected = x.clone()
    assert torch.equal(group.sum(x), expected)
    assert torch.equal(group.gather(x), expected[None])
    graph, still = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        total, each = group.sum(still * 2), group.gather(still)
    still.fill_(5)
    graph.replay()
    torch.cuda.synchronize()
    assert (total == 10).all() and (each == 5).all()
    group.abort()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}])
def test_two_gpus_answer_as_one_does(tmp_path, options):
    config = tiny_config(max_position_embeddings=512, head_dim=64)
    model = write_safetensors_model(tmp_path / "tiny", config=config)
    prompts = [f"the same beginning, number {i % 7} {'x' * (i % 5)}" for i in range(30)]
    params = SamplingParams(max_tokens=9)
    expected = LLM(model, device="cuda", kv_memory=64 << 20).generate(prompts, params)
    llm = LLM(model, device="cuda", kv_memory=64 << 20, **options)
    assert [o.text for o in llm.generate(prompts, params)] == [o.text for o in expected]
    llm.close()
