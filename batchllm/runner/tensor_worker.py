"""A worker of a model that several processes share: the same steps as rank 0, when that says so."""

from dataclasses import replace

from batchllm.child import Parent, run_child
from batchllm.engine import AheadRunner
from batchllm.models.parallel import Shard
from batchllm.request import SamplingParams
from batchllm.runner.choose_device import choose_device
from batchllm.runner.group import connect
from batchllm.runner.load import load_shard
from batchllm.runner.workers import Shrink, Step, WorkerReady, WorkerSetup


def work(rank0: Parent) -> None:
    """Load a shard, then run what comes."""
    setup = rank0.receive()
    assert isinstance(setup, WorkerSetup), setup
    size = setup.config.tensor_parallel_size
    checkpoint = setup.model.open()
    rank0.send(WorkerReady(0))
    device = choose_device(setup.config.device)
    shard = Shard(setup.rank, size, connect(setup.rank, size, setup.meeting, device))
    loaded = load_shard(checkpoint, setup.config, setup.max_model_len, shard=shard)
    runner = loaded.runner
    run = runner.submit if isinstance(runner, AheadRunner) else runner.execute
    rank0.send(WorkerReady(loaded.num_blocks))
    params: list[SamplingParams] = []
    while True:
        match rank0.receive():
            case Step(batch, new_params):
                params = params if new_params is None else new_params
                run(replace(batch, samples=replace(batch.samples, params=params)))
            case Shrink(num_blocks):
                rank0.send(WorkerReady(runner.shrink(num_blocks)))


if __name__ == "__main__":
    run_child(work)
