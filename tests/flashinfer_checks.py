"""One layer of one step, held against the reference, on any device."""

import torch

from batchllm.attention.reference import ReferenceBackend
from batchllm.models.rope import Rotation
from batchllm.runner.staging import put_now


class Caches:
    """A step's queries, keys and values and the cache before it, noise, and what comes of them."""

    def __init__(
        self,
        step,
        block_size,
        kv_heads,
        group,
        head_dim,
        *,
        dtype=torch.float32,
        tolerance=5e-5,
        device="cpu",
        num_blocks=None,
        seed=0,
    ):
        noise = torch.Generator().manual_seed(seed)
        count, num_blocks = len(step.slots), num_blocks or int(step.items.block_ids.max()) + 1
        self.step, self.tolerance = step, tolerance
        qkv = torch.randn(count, (group + 2) * kv_heads, head_dim, generator=noise) * 2
        shape = (2, num_blocks, block_size, kv_heads, head_dim)
        cache = torch.randn(shape, generator=noise).to(dtype)
        angles = torch.randn(count, head_dim // 2, generator=noise)
        rotation = Rotation(angles.cos(), angles.sin())
        expected = cache.clone()
        reference = ReferenceBackend(block_size, head_dim).plan(step, rotation)
        self.expected = reference.run(qkv.to(dtype, copy=True), *expected)
        self.expected_cache = expected
        self.qkv, self.cache = qkv.to(device, dtype), cache.to(device)
        self.rotation = Rotation(rotation.cos.to(device), rotation.sin.to(device))

    def check(self, backend, layers=1):
        """A backend's plan, run for some layers."""
        put = put_now(self.qkv.device)
        self.check_plan(backend.plan(self.step, self.rotation, put), layers)

    def check_plan(self, plan, layers=1):
        for _ in range(layers):
            cache = self.cache.clone()
            self.compare(plan.run(self.qkv.clone(), *cache), cache)

    def compare(self, got, cache):
        assert got.shape == self.expected.shape and got.dtype == self.expected.dtype
        close = {"atol": self.tolerance, "rtol": self.tolerance}
        torch.testing.assert_close(got.cpu(), self.expected, **close)
        torch.testing.assert_close(cache.cpu(), self.expected_cache, **close)
