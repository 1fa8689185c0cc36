"""A replica without a model, `python -m stub_replica`: answers are the sum of a prompt's tokens.

`$TEST_REPLICAS` has, separated by commas, what becomes of some: `1 dies 9 of 4` ends the second one
by signal 9 with its fifth group of rows in flight, `0 fails 4` ends the first by an error, and with
`1 waits` the second answers nothing before it is told to stop.
"""

import os

import numpy as np

from batchllm.child import run_child
from batchllm.errors import OutOfMemoryError
from batchllm.metrics import Metrics
from batchllm.replica_messages import (
    Done,
    Finished,
    Inbox,
    InFlight,
    Kept,
    Note,
    ReplicaLoaded,
    Stepped,
)
from batchllm.request import RequestOutput
from batchllm.runner.threads import Threads

AT_ONCE = 2  # rows in flight


def body(parent):
    me = os.environ["CUDA_VISIBLE_DEVICES"]
    fates = [fate.split() for fate in os.environ.get("TEST_REPLICAS", "").split(",")]
    fate = next((words[1:] for words in fates if words[:1] == [me]), ["lives"])
    setup = parent.receive()
    parent.send(
        ReplicaLoaded(
            num_blocks=100 + int(me),
            wanted_blocks=110,
            dtype="float32",
            threads=Threads(setup.config.machine_share, "as told"),
            attention="none",
            slower=None,
            granularity=1,
            device="cpu",
            hardware=None,
            kv_bytes_per_token=None,
            overlap=None,
        )
    )
    inbox = Inbox(parent)
    while True:
        answer(parent, inbox, inbox.next(), fate)


def answer(parent, inbox, part, fate):
    requests = part.requests()
    parent.send(Note(f"{len(requests)} rows, {part.max_num_seqs} at once"))
    if fate == ["waits"]:
        inbox.stop.wait()
    outputs, rest = [], []
    for group, begin in enumerate(range(0, len(requests), AT_ONCE)):
        if inbox.stop.is_set():
            break
        rows = requests[begin : begin + AT_ONCE]
        parent.send(InFlight(np.array([request.row_index for request in rows])))
        match fate:
            case ["dies", number, "of", at] if group == int(at):
                os.kill(os.getpid(), int(number))
            case ["fails", at] if group == int(at):
                raise OutOfMemoryError("no memory here")
        new = [output(request) for request in rows]
        parent.send(Stepped(10))
        parent.send(Finished(len(new)))
        outputs += new
        rest = new if begin + AT_ONCE >= len(requests) else []
        if not rest:
            parent.send(Kept(new))
    metrics = Metrics(rows=len(outputs), steps=3, peak_kv_blocks=7, windows=1, engine_seconds=9.0)
    parent.send(Done(rest, metrics, {"dfs"}))


def output(request):
    tokens = np.full(request.sampling_params.max_tokens, request.prompt_token_ids.sum(), np.int32)
    return RequestOutput(
        row_index=request.row_index,
        text=str(tokens[0]),
        output_token_ids=tokens,
        finish_reason="length",
        prompt_tokens=len(request.prompt_token_ids),
        cached_tokens=1,
    )


if __name__ == "__main__":
    run_child(body)
