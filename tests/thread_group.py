"""Shards in threads of this process, which meet at a barrier: a group without processes."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch

from batchllm.models.parallel import Shard

_SECONDS = 60  # a thread that waits longer waits for one that failed


class ThreadGroup:
    """What one thread sees of the others (see `Group`)."""

    def __init__(self, rank, size, slots, barrier):
        self._rank, self._size = rank, size
        self._slots, self._barrier = slots, barrier
        self.calls = 0

    def gather(self, x):
        self.calls += 1
        self._slots[self._rank] = x
        self._barrier.wait(_SECONDS)
        everybodys = torch.stack([self._slots[rank] for rank in range(self._size)])
        self._barrier.wait(_SECONDS)
        return everybodys

    def least(self, count):
        return int(self.gather(torch.tensor([count])).min())

    def sum(self, x):
        return x.copy_(self.gather(x).sum(dim=0))


def in_shards(size, call):
    """What `call(shard)` returns in each of `size` threads, by rank."""
    slots, barrier = [None] * size, Barrier(size)
    shards = [Shard(rank, size, ThreadGroup(rank, size, slots, barrier)) for rank in range(size)]

    def one(shard):
        try:
            return call(shard)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, shards))
