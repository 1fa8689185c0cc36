"""Data frames and bags of Dask answered on its workers, every shared prefix computed on one.

    answers = batchllm.dask.generate(ddf, model="…", template="…", max_tokens=16)

The table is looked at twice when `generate` is called: a sample of its prompts, and a count of what
they share. Answers are computed when Dask computes the result, by one model a worker process.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pyarrow as pa

from batchllm.errors import UsageError
from batchllm.integrations.call import GenerateCall
from batchllm.integrations.summary import Summary
from batchllm.integrations.survey import expected, sample_size, survey
from batchllm.io.answers import AnswerColumns
from batchllm.text.prompts import PromptSpec

try:
    import dask
    import dask.bag as bags
    import dask.dataframe as frames
    import distributed
    import pandas as pd
    from dask._task_spec import Task, TaskRef
    from dask.base import get_scheduler
    from dask.highlevelgraph import HighLevelGraph

    from batchllm.integrations import dask_cluster as cluster
    from batchllm.integrations import dask_graph as graphs
    from batchllm.integrations.dask_cluster import ModelPlugin
    from batchllm.integrations.dask_rows import (
        PROMPT,
        BagRows,
        FrameRows,
        common_schema,
        pandas_answers,
    )
except ImportError as error:
    raise UsageError(f"Dask cannot be used here ({error}); pip install 'batchllm[dask]'") from error

__all__ = ["ModelPlugin", "Summary", "generate", "generate_bag", "load"]

_SOURCES = ("prompt_column", "messages_column", "token_ids_column", "template")


@dataclass(frozen=True, slots=True)
class _Request:
    """A call of `generate`, and on what it is to run; `compute` takes a graph and keys."""

    call: GenerateCall
    compute: Callable[[graphs.Graph, list[graphs.Key]], Iterable[Any]]
    client: distributed.Client | None
    crew: cluster.Crew
    workers: int
    num_partitions: int | None
    machine: str | None
    resources: Mapping[str, float]
    summary: Summary | None


@dataclass(frozen=True, slots=True)
class _Answers:
    """Partitions with their answers, not computed; `columns` are those that were added."""

    graph: graphs.Graph
    keys: list[graphs.Key]
    columns: AnswerColumns


def generate(
    frame: frames.DataFrame,
    *,
    summary: Summary | None = None,
    workers: int | None = None,
    num_partitions: int | None = None,
    machine: str | None = None,
    resources: Mapping[str, float] | None = None,
    **options: Any,
) -> frames.DataFrame:
    """Answer the rows of a data frame.

    Args:
        frame: it is read four times, so `persist()` it if it is expensive to compute.
        summary: told what was done as partitions are answered; one for each call.
        workers: how many answer side by side; None is all of the client's, or one without one.
        num_partitions: how many tasks run the model, all alike; None is what suits the workers.
        machine: what a worker is like, by its name in `batchllm plan --machine`.
        resources: what a worker must have to run the model, like `{"GPU": 1}`.
        **options: `model=`, `prompt_column=`, `template=`, … (see `GenerateCall.of_options`).

    Returns:
        The same rows in the same order, partitions, index and divisions, with the columns of
        answers. It is lazy: keep what was computed (`persist()`, `to_parquet()`), for the model
        runs each time that it is.

    Raises:
        UsageError: an option makes no sense, or no worker has the resources.
        BatchLLMError: the table cannot be read, or the model not be opened.
    """
    if not isinstance(frame, frames.DataFrame):
        raise UsageError(f"a dask.dataframe.DataFrame is needed, this is a {type(frame).__name__}")
    request = _request(frame, options, summary, workers, num_partitions, machine, resources)
    answers = _answer(_frame_parts(frame, request.call), request)
    added = pandas_answers(answers.columns.schema.empty_table())
    return frames.from_graph(
        answers.graph,
        pd.concat([frame._meta, added.set_index(frame._meta.index)], axis=1),
        frame.divisions,
        answers.keys,
        "batchllm",
    )


def generate_bag(
    bag: bags.Bag,
    *,
    summary: Summary | None = None,
    workers: int | None = None,
    num_partitions: int | None = None,
    machine: str | None = None,
    resources: Mapping[str, float] | None = None,
    **options: Any,
) -> bags.Bag:
    """Answer the items of a bag: dicts, whose keys are columns, or texts, which are prompts.

    A text becomes a dict with the key `prompt`, and `prompt_column` is that if nothing else is said
    to be the prompt. Everything else is as for `generate`. Without a client, Dask computes bags in
    processes that cannot fill a summary: make a client, or compute with `scheduler="threads"`.

    Returns:
        Dicts in the same order and partitions, with the answers' keys added.
    """
    if not isinstance(bag, bags.Bag):
        raise UsageError(f"a dask.bag.Bag is needed, this is a {type(bag).__name__}")
    if not any(options.get(source) is not None for source in _SOURCES):
        options["prompt_column"] = PROMPT
    request = _request(bag, options, summary, workers, num_partitions, machine, resources)
    answers = _answer(_bag_parts(bag), request)
    name = answers.keys[0][0]
    graph = HighLevelGraph.from_collections(name, answers.graph, dependencies=[])
    return bags.Bag(graph, name, len(answers.keys))


def load(**options: Any) -> None:
    """Load the model on all workers now, and on each that comes when it starts.

    Args:
        **options: `model=` and fields of `EngineConfig`; the same as for the calls to come.

    Raises:
        UsageError: there is no client.
    """
    try:
        client = distributed.get_client()
    except ValueError as error:
        raise UsageError("there are no workers to load a model on; make a Client first") from error
    cluster.load_models(
        client, _call({"prompt_column": PROMPT} | options, cluster.crew(client, {}))
    )


def _request(
    collection: Any,  # noqa: ANN401  # a frame or a bag
    options: dict[str, Any],
    summary: Summary | None,
    workers: int | None,
    num_partitions: int | None,
    machine: str | None,
    resources: Mapping[str, float] | None,
) -> _Request:
    for name, value in (("workers", workers), ("num_partitions", num_partitions)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")
    compute = get_scheduler(collections=[collection])
    client = cluster.client_of(compute)
    crew = cluster.local_crew(compute, workers) if client is None else None
    if crew is None:
        crew = cluster.crew(client, resources or {})
    elif resources:
        raise UsageError(
            f"resources={dict(resources)} needs workers that have them; make a distributed.Client"
        )
    elif summary is not None and cluster.is_apart(compute):
        raise UsageError(
            "Dask's processes cannot fill a summary; make a distributed.Client first, or "
            "dask.config.set(scheduler='threads')"
        )
    return _Request(
        _call(options, crew),
        compute,
        client,
        crew,
        workers or max(len(crew.addresses), 1),
        num_partitions,
        machine,
        resources or {},
        summary,
    )


def _call(options: dict[str, Any], crew: cluster.Crew) -> GenerateCall:
    """The call, its engines told how much of their machine is theirs."""
    options = {"machine_share": crew.share} | options
    if crew.threads is not None:  # Dask tells OpenMP to take one, whatever it gives the worker
        options = {"threads": crew.threads * options["machine_share"]} | options
    return GenerateCall.of_options(**options)


def _frame_parts(frame: frames.DataFrame, call: GenerateCall) -> graphs.Parts:
    names = list(frame.columns)
    if strange := [name for name in names if not isinstance(name, str)]:
        raise UsageError(f"names of columns must be texts; rename {strange[0]!r}")
    schema = pa.schema([(name, _guess(call.spec).get(name, pa.string())) for name in names])
    call.check(schema)
    wanted = list(call.spec.columns_of(schema))
    # What is read for prompts alone must have the partitions of all that is read for rows.
    with dask.config.set({"optimization.tune.active": False}):
        prompts, whole = frame[wanted].optimize(), frame.optimize()
    graph = {**prompts.__dask_graph__(), **whole.__dask_graph__()}
    keys = prompts.__dask_keys__(), whole.__dask_keys__()
    assert len(keys[0]) == len(keys[1]) == frame.npartitions
    return graphs.Parts(FrameRows(), names, graph, *keys)


def _bag_parts(bag: bags.Bag) -> graphs.Parts:
    """Its partitions may be iterators, so each is made a list that can be read twice."""
    keys = bag.__dask_keys__()
    graph = dict(bag.__dask_optimize__(bag.__dask_graph__(), keys))
    name = f"batchllm-items-{uuid4().hex}"
    lists = {(name, i): Task((name, i), list, TaskRef(key)) for i, key in enumerate(keys)}
    return graphs.Parts(BagRows(), None, graph | lists, list(lists), list(lists))


def _answer(parts: graphs.Parts, request: _Request) -> _Answers:
    """The two passes, and the graph behind them."""
    token, call = uuid4().hex, request.call

    def run(tasks: graphs.Graph) -> list[Any]:
        return list(request.compute({**parts.graph, **tasks}, list(tasks)))

    size = sample_size(len(parts.prompts), request.workers, call.window_rows)
    looked = run(graphs.sample_tasks(parts, call, size, f"batchllm-sample-{token}"))
    schema = common_schema([one.schema for one in looked], _guess(call.spec))
    names = parts.names or list(dict.fromkeys(name for one in looked for name in one.names))
    table = pa.schema([_field(schema, name) for name in names])
    columns = call.check(table)
    if not call.spec.columns_of(table):
        raise UsageError("the template prints no column, so all prompts are the same")
    seen = survey(
        call,
        [one.sample for one in looked],
        request.workers,
        num_partitions=request.num_partitions,
        machine=request.machine,
    )
    tallies = run(graphs.count_tasks(parts, schema, seen.ranges, f"batchllm-count-{token}"))
    partitions = seen.partitions(tallies)
    topic = f"batchllm-{token}"
    plan = graphs.Plan(parts.rows, schema, seen.ranges, partitions.of_range, columns.schema, topic)
    if request.summary is not None:
        request.summary.clear()
        request.summary.expected = expected(partitions)
        cluster.collect_reports(request.client, topic, request.summary)
    if request.client is not None:
        cluster.hold_models(request.client)
        cluster.assign(
            request.client,
            graphs.answer_name(token),
            partitions.count,
            request.crew,
            request.resources,
        )
    return _Answers(*graphs.answer_graph(parts, plan, tallies, token), columns)


def _guess(spec: PromptSpec) -> dict[str, pa.DataType]:
    """What columns are likely of whose values nothing is known; the others are texts."""
    kinds = {spec.token_ids_column: pa.list_(pa.int32()), spec.max_tokens_column: pa.int32()}
    return {name: kind for name, kind in kinds.items() if name is not None}


def _field(schema: pa.Schema, name: str) -> pa.Field:
    return schema.field(name) if name in schema.names else pa.field(name, pa.null())
