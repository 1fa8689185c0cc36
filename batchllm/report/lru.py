"""What a cache would have found without a plan."""

import numpy as np

from batchllm.cache.lru_cache import LRUBlockCache
from batchllm.request import RaggedTokens
from batchllm.scheduler.streaming import block_keys


class LRUReplay:
    """Prompts in table order against an LRU cache of full blocks.

    One prompt at a time has the cache to itself, so it finds at least what it would with others in
    flight. The cache is empty again for every window that is added; large windows are replayed up
    to `limit` rows, enough to fill any cache many times over.
    """

    def __init__(self, kv_tokens: int, block_size: int = 16, limit: int = 20_000) -> None:
        self._num_blocks = max(kv_tokens // block_size, 1)
        self._block_size = block_size
        self._limit = limit
        self._prompt_tokens = 0
        self._found_tokens = 0

    @property
    def saved_share(self) -> float:
        """Share of prompt tokens that were found, 0 to 1."""
        return self._found_tokens / max(self._prompt_tokens, 1)

    def add(self, tokens: RaggedTokens) -> None:
        """Replay a window's prompts."""
        rows = min(len(tokens), self._limit)
        end = int(tokens.offsets[rows])
        tokens = RaggedTokens(tokens.values[:end], tokens.offsets[: rows + 1])
        cache, size = LRUBlockCache(self._num_blocks), self._block_size
        for keys, length in zip(block_keys(tokens, size), np.diff(tokens.offsets), strict=True):
            found = cache.find(keys[: (int(length) - 1) // size])
            missing = -(-int(length) // size) - len(found)
            self._prompt_tokens += int(length)
            if missing + cache.num_unused(found) > cache.num_free:
                continue  # longer than the whole cache
            cache.share(found)
            blocks = found + cache.allocate(missing)
            cache.remember(blocks[: len(keys)], keys)
            cache.release(blocks, len(keys))
            self._found_tokens += len(found) * size
