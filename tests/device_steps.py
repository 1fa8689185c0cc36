"""A tiny model's steps on a device, for tests with and without a GPU.

`DenseBackend` and `TapeRecorder` stand in for what only a GPU has: attention that can be recorded,
and a recorder.
"""

import numpy as np
import torch
from builders import random_weights, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from batchllm.attention.cascade import TorchBackend
from batchllm.attention.write import rotate_and_write
from batchllm.cache.block_pool import BlockPool
from batchllm.models.config import ModelConfig
from batchllm.models.operations import TorchOperations
from batchllm.models.registry import make_model
from batchllm.prefix.plan import plan_requests
from batchllm.request import Request, SamplingParams
from batchllm.runner.kv_cache import KVCache, memory_of
from batchllm.runner.torch_runner import TorchRunner
from batchllm.scheduler.batch import Batch, Carried
from batchllm.scheduler.scheduler import Scheduler

BLOCK_SIZE = 4
NUM_BLOCKS = 300
POISON = 49
ATTENTION_GAIN = 6
MAX_NUM_SEQS = 20
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.3, seed=1),
    SamplingParams(temperature=0.8, top_k=5, top_p=0.8),
    SamplingParams(temperature=1.0, top_p=0.5, seed=7),
]


def tiny_model(operations, device=torch.device("cpu"), dtype=torch.float32, **changes):  # noqa: B008
    """Two layers of noise, the same on every device, whose tokens depend on all of the context.

    Who reads the token `POISON` gets NaNs for logits.
    """
    raw = tiny_config(
        vocab_size=50, max_position_embeddings=512, tie_word_embeddings=False, **changes
    )
    weights = random_weights(raw)
    for name, weight in weights.items():
        if ".self_attn." in name:
            weight *= ATTENTION_GAIN
    weights["model.embed_tokens.weight"][POISON] = np.nan
    weights["lm_head.weight"][POISON] = 0  # so that it is not sampled
    with device:
        model = make_model(ModelConfig.from_hugging_face(raw), dtype, operations)
        model.load((n, torch.from_numpy(w).to(dtype)) for n, w in weights.items())
        model.pack(None)
    return model


def cache_of(model, num_blocks, device=torch.device("cpu")):  # noqa: B008
    shape = model.config
    cache = KVCache(
        num_layers=shape.num_layers,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=model.dtype,
        allocate=memory_of(device),
    )
    cache.keys.fill_(torch.nan)  # as after a sequence that went astray
    cache.values.fill_(torch.nan)
    return cache


def carrying(batch, previous):
    """The same batch made a step earlier, when what `previous` sampled was not known yet."""
    if previous is None:
        return batch
    ends = np.cumsum(batch.chunks.count) - 1
    samplers = batch.samples.sequence.tolist(), batch.samples.chunk.tolist()
    place = {sequence: int(ends[chunk]) for sequence, chunk in zip(*samplers, strict=True)}
    each = [(place[s], i) for i, s in enumerate(previous.samples.sequence.tolist()) if s in place]
    token, sample = np.array(each, dtype=np.int64).reshape(-1, 2).T
    token_ids = batch.token_ids.copy()
    token_ids[token] = 0
    changed = {name: getattr(batch, name) for name in Batch.__slots__}
    return Batch(**changed | {"token_ids": token_ids, "carried": Carried(token, sample)})


def requests(rows, params=PARAMS):
    return [
        Request(
            i,
            np.array(prompt, np.int32),
            SamplingParams(
                **{name: getattr(params[which], name) for name in SamplingParams.__slots__}
                | {"max_tokens": most, "ignore_eos": True}
            ),
        )
        for i, (prompt, most, which) in enumerate(rows)
    ]


def run_all(requests, runner, budget=24):
    """Answer requests by a runner."""
    scheduler = Scheduler(
        BlockPool(NUM_BLOCKS, BLOCK_SIZE),
        max_model_len=400,
        max_num_batched_tokens=budget,
        max_num_seqs=MAX_NUM_SEQS,
    )
    scheduler.add(plan_requests(requests))
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        scheduler.update(batch, runner.execute(batch))


class Both:
    """The CPU's runner and the device's side by side, which must sample the same."""

    def __init__(self, model, runner):
        cache = cache_of(model, NUM_BLOCKS)
        backend = TorchBackend(BLOCK_SIZE, 16)
        self._expected = TorchRunner(model, cache, backend, TorchOperations(), BLOCK_SIZE)
        self.runner = runner
        self._previous = None
        self.steps = self.num_carried = self.decode_steps = 0

    def execute(self, batch):
        expected = self._expected.execute(batch)
        given = carrying(batch, self._previous)
        pending = self.runner.submit(given)
        self._previous = batch
        self.steps += 1
        self.num_carried += len(given.carried)
        self.decode_steps += batch.is_decode_only
        got = pending.result()
        assert got.token_ids.dtype == np.int32
        np.testing.assert_array_equal(got.token_ids, expected.token_ids)
        return expected

    def run(self, requests, budget=24):
        self._previous = None
        run_all(requests, self, budget)
        return self


class DenseBackend:
    """What each query sees, gathered and masked: a few operations for any step.

    Steps with a query that sees more than `width` tokens are not for recordings.
    """

    name = "dense"
    granularity = 1

    def __init__(self, width=64):
        self.width = width
        self.updates = self.refusals = 0

    def on_share(self, share):
        assert 0 < share < 1
        return self

    def plan(self, step, rotation, put=torch.from_numpy):
        seen = seen_slots(step)
        width = max(map(len, seen))
        return DenseStep(rotation, put(step.slots), put(padded(seen, width)), put(lengths(seen)))

    def graph_plan(self, max_num_tokens, rotation, reserve):
        return DensePlan(self, max_num_tokens, rotation, reserve)


class LateStream:
    """A side stream that does what it was given as late as it may: when somebody waits for it."""

    def __init__(self):
        self.waiting = []
        self.starts = self.most_waiting = 0

    def start(self, call):
        self.starts += 1
        self.waiting.append(LateWork(self, call))
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        return self.waiting[-1]


class LateWork:
    def __init__(self, stream, call):
        self._stream, self._call = stream, call

    def join(self):
        while True:
            first = self._stream.waiting.pop(0)
            result = first._call()
            if first is self:
                return result


def seen_slots(step):
    """Where the tokens that each query sees lie, a list for each."""
    seen, items = [[] for _ in step.token_ids], step.items
    for item in range(len(items)):
        blocks = items.blocks(item)[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)
        slots = blocks.ravel()[: items.kv_len[item]].tolist()
        for query in range(int(items.query_begin[item]), int(items.query_end[item])):
            hidden = int(items.query_end[item]) - 1 - query if items.own[item] else 0
            seen[query] += slots[: len(slots) - hidden]
    return seen


def padded(seen, width):
    """Each list filled up with its last one, which its query may see."""
    return np.array([slots + [slots[-1]] * (width - len(slots)) for slots in seen])


def lengths(seen):
    return np.array([len(slots) for slots in seen], dtype=np.int32)


class DenseStep:
    """`slots` [n], `seen` [n, width] and how many of these count, [n]."""

    def __init__(self, rotation, slots, seen, counts):
        self.rotation, self.slots, self.seen, self.counts = rotation, slots, seen, counts

    def run(self, qkv, keys, values):
        query, _, _ = rotate_and_write(self.rotation, self.slots, qkv, keys, values)
        num_kv_heads, head_dim = keys.shape[2:]
        k, v = (cache.flatten(0, 1)[self.seen].double() for cache in (keys, values))
        q = query.double().view(len(qkv), num_kv_heads, -1, head_dim)
        scores = torch.einsum("nhgd,nlhd->nhgl", q, k) / head_dim**0.5
        width = torch.arange(self.seen.shape[1], device=k.device)
        hidden = (width >= self.counts[:, None])[:, None, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("nhgl,nlhd->nhgd", weights, v).flatten(1).to(qkv.dtype)


class DensePlan:
    def __init__(self, backend, most, rotation, reserve):
        self._backend, self._rotation = backend, rotation
        self._slots = reserve(most, np.int64)
        self._counts = reserve(most, np.int32)
        self._seen = reserve(most * backend.width, np.int64)

    def update(self, step):
        items = step.items
        assert (items.query_end - items.query_begin)[items.own].max() == 1
        seen = seen_slots(step)
        if max(map(len, seen)) > self._backend.width:
            self._backend.refusals += 1
            return False
        self._slots.fill(step.slots)
        self._counts.fill(lengths(seen))
        self._seen.fill(padded(seen, self._backend.width))
        self._backend.updates += 1
        return True

    def run(self, qkv, keys, values):
        count, width = len(qkv), self._backend.width
        seen = self._seen.tensor.view(-1, width)[:count]
        slots, counts = self._slots.tensor[:count], self._counts.tensor[:count]
        step = DenseStep(self._rotation.first(count), slots, seen, counts)
        return step.run(qkv, keys, values)


class NoWaiting(TorchDispatchMode):
    """Fails where a GPU would have to be waited for, as far as operations tell.

    Those whose result's size is in the data, those that hand a number to the host, and a list made
    a tensor, which goes to a GPU by a copy that waits.
    """

    FORBIDDEN = frozenset(
        {
            *("_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "_unique2"),
            *("unique_dim", "unique_consecutive", "is_nonzero", "equal", "lift_fresh", "bincount"),
            *("repeat_interleave", "allclose", "histc", "argwhere", "nonzero_numpy", "_unique"),
            "item",
        }
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        assert func is not torch.ops.aten.where.default, "where of a mask alone waits"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            kinds = [index.dtype for index in args[1] if index is not None]
            assert torch.bool not in kinds and torch.uint8 not in kinds, "a mask as an index waits"
        return func(*args, **kwargs or {})


class TapeRecorder:
    """Records a call's operations and repeats them on the same memory, as a CUDA graph does.

    No line of the call runs again. What it read that was there before is read where it was; what it
    made itself is spoilt once it is recorded, as another's replay would.
    """

    def __init__(self):
        self.records = self.replays = self.forgotten = 0

    def record(self, call):
        self.records += 1
        with _Tape() as tape:
            call()
        assert tape.operations, "nothing to record"
        tape.spoil()

        def replay():
            self.replays += 1
            tape.replay()

        return replay

    def forget(self):
        self.forgotten += 1


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = []  # (function, arguments, their structure), with places for what is made
        self._places = {}  # of what the operations made, by identity
        self._made = []  # by place; kept alive, so that no identity is given twice
        self._given = []  # storages of all else

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        arguments, structure = tree_flatten((args, kwargs or {}))
        told = [self._tell(a) for a in arguments]
        result = func(*args, **kwargs or {})
        first = len(self._made)
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor):
                self._places[id(value)] = len(self._made)
                self._made.append(value)
        self.operations.append((func, told, structure, first))
        return result

    def _tell(self, value):
        if isinstance(value, torch.Tensor):
            if id(value) in self._places:
                return _Made(self._places[id(value)])
            self._given.append(value.untyped_storage().data_ptr())
        return value

    def spoil(self):
        given = set(self._given)
        for tensor in self._made:
            if tensor.untyped_storage().data_ptr() not in given:
                tensor.untyped_storage().fill_(0x55)
        self._made.clear()

    def replay(self):
        made = {}
        for func, told, structure, first in self.operations:
            arguments = [made[a.place] if isinstance(a, _Made) else a for a in told]
            args, kwargs = tree_unflatten(arguments, structure)
            results = tree_flatten(func(*args, **kwargs))[0]
            tensors = [r for r in results if isinstance(r, torch.Tensor)]
            made.update(enumerate(tensors, start=first))


class _Made:
    def __init__(self, place):
        self.place = place
