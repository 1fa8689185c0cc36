"""Ray Data: `generate(dataset)`, by a pool of actors that have a model each.

The dataset is looked at and its prompts are put in order first, by tasks (`batchllm/integrations`);
each actor then answers whole partitions of that order, so that what rows share is computed once.
"""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from batchllm.errors import BatchLLMError, UsageError

try:
    import ray
    from ray.data import ActorPoolStrategy, Dataset, from_arrow, from_arrow_refs
    from ray.exceptions import RayTaskError
except ImportError as error:
    raise UsageError("batchllm.ray needs Ray Data: pip install 'batchllm[ray]'") from error

from batchllm.integrations.call import GenerateCall
from batchllm.integrations.passes import Ranges
from batchllm.integrations.ray_actors import PARTITION, Answerer, Attempts
from batchllm.integrations.ray_tasks import (
    Dealing,
    count_block,
    deal_block,
    finish_block,
    gather,
    return_block,
    sample_block,
    schema_of,
)
from batchllm.integrations.summary import PartitionReport, Summary
from batchllm.integrations.survey import expected, sample_size, survey

__all__ = ["Summary", "generate"]

Refs = list["ray.ObjectRef[Any]"]
_schema = ray.remote(schema_of)
_sample = ray.remote(sample_block)
_count = ray.remote(count_block)
_deal = ray.remote(deal_block)
_gather = ray.remote(gather).options(scheduling_strategy="SPREAD")
_return = ray.remote(return_block)
_finish = ray.remote(finish_block)
_Attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts)


@dataclass(frozen=True, slots=True)
class Pool:
    """The actors: how many, and what each of them takes of its node."""

    workers: int
    num_cpus: float | None
    num_gpus: float | None

    @classmethod
    def choose(cls, workers: int | None, num_cpus: float | None, num_gpus: float | None) -> "Pool":
        """As asked, or an actor for each GPU's worth, or each node."""
        if workers is None and num_gpus:
            workers = int(ray.cluster_resources().get("GPU", 0) // num_gpus)
        workers = _num_nodes() if workers is None else workers
        if workers < 1:
            raise UsageError(f"workers is {workers}; it must be at least 1")
        return cls(workers, num_cpus, num_gpus)

    def adapt(self, call: GenerateCall) -> GenerateCall:
        """The call for an actor that may not be alone on its machine."""
        config = call.config
        share = max(config.machine_share, -(-self.workers // _num_nodes()))
        threads = config.threads
        if threads is None and self.num_cpus is not None:  # threads are of all that share it
            threads = max(int(self.num_cpus), 1) * share
        return replace(call, config=replace(config, machine_share=share, threads=threads))


def generate(
    dataset: Dataset,
    *,
    summary: Summary | None = None,
    workers: int | None = None,
    num_partitions: int | None = None,
    machine: str | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    **options: Any,
) -> Dataset:
    """Answer every row of a dataset, now: its answers are in Ray's object store afterwards.

    Args:
        dataset: is executed once, and kept in the object store meanwhile.
        summary: is told what it took.
        workers: how many actors; None is one for each node, or as many as there are GPUs for.
        num_partitions: how many to make, all alike; None is what suits the workers.
        machine: what a worker is like, by its name in `simulate`; None is like the driver's.
        num_cpus: that an actor reserves, and computes with. None reserves one, and computes with
            its share of the node's cores.
        num_gpus: that an actor reserves.
        **options: see `GenerateCall.of_options`.

    Returns:
        The dataset's blocks in its order, with the answer columns behind their own.

    Raises:
        BatchLLMError: an option makes no sense, the columns do not fit, or the model cannot be
            loaded or run. A bad row is an answer with an error.
    """
    call = GenerateCall.of_options(**options)
    with _our_errors():
        blocks = _blocks(dataset)
        schema = ray.get(_schema.remote(blocks[0]))
        added = call.check(schema).schema
        pool = Pool.choose(workers, num_cpus, num_gpus)
        call = pool.adapt(call)
        # Without a column there would be no rows, and a template may well use none.
        names = list(call.spec.columns_of(schema)) or schema.names[:1]
        size = sample_size(len(blocks), pool.workers, call.window_rows)
        samples = ray.get([_sample.remote(b, names, size, i) for i, b in enumerate(blocks)])
        looked = survey(call, samples, pool.workers, num_partitions=num_partitions, machine=machine)
        ranges = ray.put(looked.ranges)
        tallies = [_count.remote(b, names, ranges, i) for i, b in enumerate(blocks)]
        partitions = looked.partitions(ray.get(tallies))
        answered: Refs = []
        if looked.num_rows:
            prompts = _shuffle(blocks, Dealing(looked.ranges, names, partitions.of_range))
            answered = _answer(prompts, looked.ranges.call, added, pool)
        finished, reports = _return_all(blocks, answered, looked.ranges, added)
    if summary is not None:
        summary.clear()
        summary.expected = expected(partitions)
        summary.add(reports)
    return from_arrow_refs(finished)


def _blocks(dataset: Dataset) -> Refs:
    """The dataset's blocks, executed, in their order; at least one.

    Raises:
        UsageError: it has no columns.
    """
    options = dataset.context.execution_options
    before, options.preserve_order = options.preserve_order, True
    try:
        blocks: Refs = dataset.materialize().to_arrow_refs()
    finally:
        options.preserve_order = before
    if blocks:
        return blocks
    found = dataset.schema()
    if found is None or not isinstance(found.base_schema, pa.Schema):
        raise UsageError("the dataset has neither rows nor columns")
    return [ray.put(found.base_schema.empty_table())]


def _shuffle(blocks: Refs, dealing: Dealing) -> Refs:
    """The prompts of each partition."""
    deal, sent = _deal.options(num_returns=dealing.count), ray.put(dealing)
    pieces = [deal.remote(block, sent, number) for number, block in enumerate(blocks)]
    of_each = [pieces] if dealing.count == 1 else list(zip(*pieces, strict=True))
    return _all_there([_gather.remote(*mine) for mine in of_each])


def _answer(prompts: Refs, call: GenerateCall, added: pa.Schema, pool: Pool) -> Refs:
    """Blocks of answers, in any order.

    What goes through the pool is the partitions' numbers, a block each, since Ray may put blocks
    together or cut them. An actor has one at a time, so that whoever is free takes the next; one
    that dies is started again, and so is what it had begun.
    """
    numbers = from_arrow([pa.table({PARTITION: [number]}) for number in range(len(prompts))])
    answered = numbers.map_batches(
        Answerer,
        fn_constructor_args=(call, added, prompts, _Attempts.remote()),
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=min(pool.workers, len(prompts)), max_tasks_in_flight_per_actor=1
        ),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
    )
    refs: Refs = answered.materialize().to_arrow_refs()
    return refs


def _return_all(
    blocks: Refs, answered: Refs, ranges: Ranges, added: pa.Schema
) -> tuple[Refs, Sequence[PartitionReport]]:
    """The input's blocks with their answers, and all reports."""
    count = len(blocks)
    first_row = ray.put(ranges.first_row)
    back = _return.options(num_returns=count + 1)
    pieces = [back.remote(one, first_row) for one in answered]
    finished = [
        _finish.remote(block, added, *(mine[number] for mine in pieces))
        for number, block in enumerate(blocks)
    ]
    reports = ray.get([mine[count] for mine in pieces])
    return _all_there(finished), [pickle.loads(one) for some in reports for one in some]


def _all_there(refs: Refs) -> Refs:
    """Wait for tasks: actors that reserve all CPUs would keep those that they wait for waiting."""
    ray.wait(refs, num_returns=len(refs), fetch_local=False)
    return refs


def _num_nodes() -> int:
    nodes = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    return max(len(nodes), 1)


@contextmanager
def _our_errors() -> Iterator[None]:
    """Raise what a task of ours raised, as it did."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, BatchLLMError):
            raise error.cause from error
        raise
