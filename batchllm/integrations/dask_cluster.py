"""The Dask cluster that answers: who may, on how many machines, and what its scheduler is told.

Expressions of `dask.dataframe` lose annotations on the way to the scheduler, so what would be one
is applied by a scheduler plugin, to the tasks by their keys, before they are first assigned.
"""

import pickle
from asyncio import to_thread
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import distributed
from dask import multiprocessing
from distributed.diagnostics.plugin import SchedulerPlugin, WorkerPlugin

from batchllm.errors import UsageError
from batchllm.integrations.call import GenerateCall
from batchllm.integrations.held import HOLDER
from batchllm.integrations.summary import PartitionReport, Summary

_LOCAL: dict[str, Summary] = {}  # by topic, of calls that this process itself answers
_PLUGIN = "batchllm-model"


@dataclass(frozen=True, slots=True)
class Crew:
    """The workers that may answer: their addresses, and what is true of each at least.

    `share` is how many of them are on one host, at most; `threads` is how many Dask gave the one
    that has fewest, None where there is no cluster.
    """

    addresses: tuple[str, ...]
    share: int
    threads: int | None


def client_of(compute: object) -> distributed.Client | None:
    """The cluster's client, if it is a cluster that this computes on."""
    owner = getattr(compute, "__self__", None)
    return owner if isinstance(owner, distributed.Client) else None


def is_apart(compute: object) -> bool:
    """Whether this computes in Dask's pool of processes, which nobody can hear from."""
    return compute is multiprocessing.get


def local_crew(compute: object, workers: int | None) -> Crew:
    """This process, or so many of Dask's pool."""
    return Crew((), workers or 1 if is_apart(compute) else 1, None)


def crew(client: distributed.Client, resources: Mapping[str, float]) -> Crew:
    """Who of the cluster may answer.

    Raises:
        UsageError: nobody has these resources.
    """
    workers = client.scheduler_info()["workers"]
    fit = {
        address: worker
        for address, worker in workers.items()
        if all(worker["resources"].get(name, 0) >= least for name, least in resources.items())
    }
    if resources and not fit:
        offers = sorted({str(worker["resources"]) for worker in workers.values()})
        raise UsageError(
            f"no worker has resources={dict(resources)}, so this would wait for ever; the "
            f"{len(workers)} workers have {' or '.join(offers) or 'none'} (start them with "
            "dask worker --resources 'GPU=1')"
        )
    hosts = Counter(worker["host"] for worker in fit.values())
    threads = min((worker["nthreads"] for worker in fit.values()), default=None)
    return Crew(tuple(fit), max(hosts.values(), default=1), threads)


class ModelPlugin(WorkerPlugin):  # type: ignore[misc]
    """A worker's model: gone with the worker, and loaded ahead of its first task if asked.

    Args:
        ahead: whose model to load when the worker starts, if any.
    """

    name = _PLUGIN

    def __init__(self, ahead: GenerateCall | None = None) -> None:
        self.ahead = ahead

    async def setup(self, worker: distributed.Worker) -> None:
        if self.ahead is not None:
            await to_thread(_load, self.ahead)  # the worker goes on talking to its scheduler

    async def teardown(self, worker: distributed.Worker) -> None:
        await to_thread(HOLDER.drop)


def _load(call: GenerateCall) -> None:
    with HOLDER.use(call):
        pass


def hold_models(client: distributed.Client) -> None:
    """Have every worker, also those to come, give its model back when it ends."""
    plugin = ModelPlugin()
    plugin.idempotent = True  # another call's, with a model loaded ahead, stays
    client.register_plugin(plugin, name=_PLUGIN)


def load_models(client: distributed.Client, call: GenerateCall) -> None:
    """Load the call's model on all workers now, and on those that come."""
    client.register_plugin(ModelPlugin(call), name=_PLUGIN)


@dataclass(slots=True)
class Assign(SchedulerPlugin):  # type: ignore[misc]
    """Says where a call's answers are computed.

    `name` are their keys' first part. Each needs `resources`; the first ones, which are the
    largest, are meant for a worker each of `addresses`; and the largest are begun first.
    """

    name: str
    count: int
    addresses: tuple[str, ...]
    resources: dict[str, float]

    def update_graph(
        self, scheduler: distributed.Scheduler, *, tasks: list[Any], **_: object
    ) -> None:
        for key in tasks:
            if not (isinstance(key, tuple) and key[0] == self.name):
                continue
            task, number = scheduler.tasks[key], key[1]
            first, *rest = task.priority
            task.priority = (first - 1 + number / self.count, *rest)
            if self.resources:
                task.resource_restrictions = self.resources
            elif number < len(self.addresses):
                task.worker_restrictions = {self.addresses[number]}
                task.loose_restrictions = True  # a worker that is gone is no reason to wait


def assign(
    client: distributed.Client,
    name: str,
    count: int,
    crew: Crew,
    resources: Mapping[str, float],
) -> None:
    """Tell the scheduler where `count` answer tasks, with keys `(name, number)`, belong."""
    plugin = Assign(name, count, crew.addresses, dict(resources))
    client.register_plugin(plugin, name=name)


def collect_reports(client: distributed.Client | None, topic: str, summary: Summary) -> None:
    """Have the reports sent under this topic put into a summary."""
    if client is None:
        _LOCAL[topic] = summary
        return
    client.subscribe_topic(topic, lambda event: summary.add([pickle.loads(event[1])]))


def send_report(topic: str, report: PartitionReport) -> None:
    """Send a report to whoever made the call, from wherever this task runs."""
    try:
        worker = distributed.get_worker()
    except ValueError:
        if (summary := _LOCAL.get(topic)) is not None:
            summary.add([report])
        return
    worker.log_event(topic, pickle.dumps(report))
