"""Several engines that answer a window together, each a process with a model of its own.

A window's requests are divided so that each replica gets prompts that share, and all take about as
long (prefix/divide.py). Answers come back as they are finished. Whoever asks for them does not see
who gave them, but for what `prefix/divide.py` says is computed twice.

A replica that is killed from outside costs nothing but time: what it had not handed over is divided
among the others. A night's work on eight GPUs should not end because one of them fell off the bus.
One that crashes is another matter: it may be a row that did it, which would take the others along,
one after the other. So that ends the work, and says which rows were in flight; so does an error.
"""

import os
import queue
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from threading import Thread

import numpy as np

from batchllm.child import Child, environ_with_gpus
from batchllm.config import EngineConfig
from batchllm.errors import BatchLLMError, WorkerCrashedError, WorkerError, WorkerKilledError
from batchllm.metrics import Metrics
from batchllm.models.checkpoint import Checkpoint, ModelSource
from batchllm.prefix.divide import Division
from batchllm.prefix.plan import PrefixPlan, plan_requests
from batchllm.prefix.policies.registry import STREAMING
from batchllm.replica_messages import (
    Done,
    Finished,
    InFlight,
    Kept,
    Note,
    Part,
    ReplicaLoaded,
    ReplicaSetup,
    Rows,
    Stepped,
    Stop,
)
from batchllm.request import Request, RequestOutput
from batchllm.runner.choose_device import check_gpus, choose_device
from batchllm.scheduler.factory import SchedulerLimits
from batchllm.scheduler.lengths import LengthEstimator
from batchllm.simulate.cost import CostModel
from batchllm.simulate.division import divide_plan
from batchllm.text.ragged import take_rows
from batchllm.watch import Watch

_REPLICA = "batchllm.replica"
_POLL_SECONDS = 0.1  # how often it is asked whether to stop, if nothing else happens


@dataclass(slots=True, eq=False)
class _Replica:
    """One of the processes, as this one sees it."""

    child: Child
    loaded: ReplicaLoaded
    in_flight: Rows = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    kept: list[RequestOutput] = field(default_factory=list)  # of the part it is at


@dataclass(slots=True)
class Answers:
    """What the replicas have answered so far, and what it took."""

    outputs: list[RequestOutput] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    policies: set[str] = field(default_factory=set)
    peak_kv_blocks: int = 0

    def keep(self, outputs: list[RequestOutput], watch: Watch) -> None:
        """Take answers in."""
        self.outputs += outputs
        if outputs:
            watch.keep(outputs)

    def finish(self, done: Done) -> None:
        """Count a part that is done; what windows and seconds are is for the caller to say."""
        self.policies |= done.policies
        self.peak_kv_blocks += done.metrics.peak_kv_blocks
        self.metrics.add(
            replace(done.metrics, windows=0, plan_seconds=0.0, engine_seconds=0.0, peak_kv_blocks=0)
        )


class Replicas:
    """Processes that each have a model loaded.

    Args:
        checkpoint: the model.
        config: of all of them together.

    Raises:
        UsageError: there are fewer GPUs than processes.
        BatchLLMError: one of them cannot load it.
    """

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig) -> None:
        self._config = config
        count, each = config.data_parallel_size, config.tensor_parallel_size
        device = choose_device(config.device)
        check_gpus(device, count * each)
        alone = replace(
            config,
            device=device,
            data_parallel_size=1,
            machine_share=config.machine_share * count,
        )
        children: list[Child] = []
        self.close = weakref.finalize(self, _end, children)
        try:
            for number in range(count):
                environ = environ_with_gpus(os.environ, number * each, each)
                children.append(Child(_REPLICA, f"replica {number + 1}", environ))
                children[-1].send(ReplicaSetup(ModelSource.of(checkpoint), alone))
            self._alive = [_Replica(child, _loaded(child)) for child in children]
        except BaseException:
            self.close()
            raise
        loaded = [replica.loaded for replica in self._alive]
        self.loaded = replace(
            loaded[0],
            num_blocks=sum(one.num_blocks for one in loaded),
            wanted_blocks=sum(one.wanted_blocks for one in loaded),
        )
        self._lengths = LengthEstimator()
        self._inbox: queue.SimpleQueue[tuple[_Replica, object]] = queue.SimpleQueue()
        for replica in self._alive:
            Thread(target=_listen, args=(replica, self._inbox), daemon=True).start()

    def answer(
        self,
        requests: Sequence[Request],
        limits: SchedulerLimits,
        costs: CostModel,
        watch: Watch,
    ) -> Answers:
        """Answer requests; the outputs are in no order, and fewer where `watch` stopped it.

        With `limits.max_num_seqs` of 1 a single replica answers: then one row at a time is meant.

        Raises:
            WorkerCrashedError: a replica crashed; `rows` are those that were in flight there.
            BatchLLMError: a replica failed, or none is left. All are ended.
        """
        answers = Answers()
        left = list(requests)
        try:
            while left and not watch.should_stop():
                plan = self._plan(left)
                if watch.progress and len(left) == len(requests):
                    watch.progress.start_window(plan)
                division = self._divide(plan, limits, costs)
                answers.metrics.division_repeated_tokens += division.repeated_tokens
                self._round(_parts(plan, division, limits.max_num_seqs), answers, watch)
                answered = {output.row_index for output in answers.outputs}
                left = [request for request in left if request.row_index not in answered]
        except BaseException:  # some are at work for nobody
            self.close()
            raise
        self._learn(requests, answers.outputs)
        answers.metrics.peak_kv_blocks = answers.peak_kv_blocks
        return answers

    def _plan(self, requests: Sequence[Request]) -> PrefixPlan:
        if not self.close.alive or not self._alive:
            raise WorkerError("the replicas have been ended, by an error or by `close`")
        return plan_requests(
            requests,
            policy=STREAMING if self._config.policy == STREAMING else "dfs",
            sharing=self._config.sharing,
            granularity=self.loaded.granularity,
        )

    def _divide(self, plan: PrefixPlan, limits: SchedulerLimits, costs: CostModel) -> Division:
        count = 1 if limits.max_num_seqs == 1 else len(self._alive)
        each = replace(limits, num_blocks=limits.num_blocks // self._config.data_parallel_size)
        return divide_plan(plan, self._lengths.expected(plan), each, costs, count)

    def _round(self, parts: list[Part], answers: Answers, watch: Watch) -> None:
        """Have parts answered, but for what those leave behind that are killed meanwhile."""
        busy: list[_Replica] = []
        for replica, part in zip(self._alive, parts, strict=False):
            if len(part.row_index):
                replica.child.send(part)
                busy.append(replica)
        has_stopped = False
        while busy:
            if not has_stopped and watch.should_stop():
                has_stopped = True
                for replica in busy:
                    replica.child.send(Stop())
            try:
                replica, message = self._inbox.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(message, BatchLLMError):
                self._lose(replica, message, watch)
                answers.metrics.add(_count(replica.kept))
            else:
                _take(replica, message, answers, watch)
            if isinstance(message, BatchLLMError | Done):
                replica.in_flight, replica.kept = replica.in_flight[:0], []
                busy = [other for other in busy if other is not replica]
            elif isinstance(message, InFlight) and watch.before_step:
                watch.before_step(np.concatenate([other.in_flight for other in busy]))

    def _lose(self, replica: _Replica, error: BatchLLMError, watch: Watch) -> None:
        """Go on without a replica, if it was killed and is not the last."""
        self._alive.remove(replica)
        replica.child.close()
        if isinstance(error, WorkerCrashedError):
            raise WorkerCrashedError(str(error), error.reason, replica.in_flight.tolist())
        if not isinstance(error, WorkerKilledError) or not self._alive:
            raise error
        if watch.progress:
            watch.progress.note(f"{error}; the others answer what it has left")

    def _learn(self, requests: Sequence[Request], outputs: list[RequestOutput]) -> None:
        """Take note of how long answers are, so that the next window's can be foreseen."""
        longest = {r.row_index: r.sampling_params.max_tokens for r in requests}
        fine = [output for output in outputs if output.error is None]
        self._lengths.observe(
            np.array([output.output_tokens for output in fine], dtype=np.int64),
            np.array([longest[output.row_index] for output in fine], dtype=np.int64),
        )


def _take(replica: _Replica, message: object, answers: Answers, watch: Watch) -> None:
    """Hand on what a replica says."""
    progress = watch.progress
    match message:
        case InFlight(rows):
            replica.in_flight = rows
        case Kept(outputs):
            replica.kept += outputs
            answers.keep(outputs, watch)
        case Done(outputs):
            answers.keep(outputs, watch)
            answers.finish(message)
        case Stepped(num_tokens) if progress:
            progress.add_tokens(num_tokens)
        case Finished(num_rows) if progress:
            progress.finish_rows(num_rows)
        case Note(text) if progress:
            progress.note(f"{replica.child.name}: {text}")


def _count(outputs: list[RequestOutput]) -> Metrics:
    """What is known of a part that was cut short: what came of it, and not what else it took."""
    fine = [output for output in outputs if output.error is None]
    output_tokens = sum(output.output_tokens for output in outputs)
    return Metrics(
        rows=len(outputs),
        failed=len(outputs) - len(fine),
        prompt_tokens=sum(output.prompt_tokens for output in fine),
        computed_prompt_tokens=sum(output.prompt_tokens - output.cached_tokens for output in fine),
        output_tokens=output_tokens,
        computed_output_tokens=output_tokens,
    )


def _parts(plan: PrefixPlan, division: Division, max_num_seqs: int) -> list[Part]:
    """Each range's requests, in the order they were given."""
    tree, parts = plan.tree, []
    for begin, end in zip(division.bounds[:-1], division.bounds[1:], strict=True):
        rows = np.sort(tree.rows[tree.row_offsets[begin] : tree.row_offsets[end]])
        used, index = np.unique(plan.params_index[rows], return_inverse=True)
        parts.append(
            Part(
                take_rows(plan.tokens, rows),
                plan.row_index[rows],
                [plan.params[i] for i in used],
                index,
                max_num_seqs,
            )
        )
    return parts


def _loaded(child: Child) -> ReplicaLoaded:
    message = child.receive()
    assert isinstance(message, ReplicaLoaded), message
    return message


def _listen(replica: _Replica, inbox: "queue.SimpleQueue[tuple[_Replica, object]]") -> None:
    """Put what a replica says into the inbox, in the end how it ended."""
    while True:
        try:
            message = replica.child.receive()
        except BatchLLMError as error:
            inbox.put((replica, error))
            return
        inbox.put((replica, message))


def _end(children: Sequence[Child]) -> None:
    for child in children:
        child.close()
