"""Steps of the GPU's runner with FlashInfer's backend, read plainly, against the CPU's runner."""

import flashinfer_reading
import numpy as np
import pytest
import torch
from device_steps import BLOCK_SIZE, MAX_NUM_SEQS, NUM_BLOCKS, Both, cache_of, requests, tiny_model

from batchllm.attention.backend import Heads
from batchllm.attention.flashinfer import FlashInferBackend
from batchllm.models.device_operations import DeviceOperations
from batchllm.models.flashinfer_operations import FlashInferOperations
from batchllm.models.operations import TorchOperations
from batchllm.runner import decode_graphs
from batchllm.runner.device import CpuDevice
from batchllm.runner.device_runner import DeviceRunner


class Repeating:
    """Runs the call again: the reading of a call is no operation of torch's to be recorded."""

    def __init__(self):
        self.records = 0

    def record(self, call):
        self.records += 1
        return call


@pytest.mark.parametrize("is_recorded", [False, True])
def test_it_samples_what_the_cpu_runner_does(is_recorded, monkeypatch):
    monkeypatch.setattr(decode_graphs, "_RUNS_BEFORE", 1)
    operations = FlashInferOperations(DeviceOperations(), flashinfer_reading)
    model = tiny_model(operations, head_dim=64)
    heads = Heads(model.config.num_heads, model.config.num_kv_heads, 64)
    runner = DeviceRunner(
        model,
        cache_of(model, NUM_BLOCKS + 1),
        FlashInferBackend(
            BLOCK_SIZE, heads, flashinfer_reading, fold_below=25, dtype=torch.float32
        ),
        operations,
        CpuDevice(),
        block_size=BLOCK_SIZE,
        max_num_seqs=MAX_NUM_SEQS,
        recorder=(recorder := Repeating()) if is_recorded else None,
    )
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 2, rng.integers(1, 20)).tolist(), 4 + i % 9, i % 4) for i in range(19)]
    both = Both(tiny_model(TorchOperations(), head_dim=64), runner).run(requests(rows))
    assert both.num_carried > 50 and both.decode_steps > 3
    assert not is_recorded or recorder.records > 1
