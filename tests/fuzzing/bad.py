"""A target that does all that no target should, to see that it is told."""

import os
import random
import time

from batchllm.errors import UsageError


class LongError(UsageError):
    """A message that is not made one line."""

    def __str__(self):
        return "two\nlines"


class Bad:
    """Cases 1 to 6 are findings, each of another kind."""

    def __init__(self, scratch):
        pass

    def run(self, rng):
        match [random.Random(f"bad {seed}").getstate() for seed in range(8)].index(rng.getstate()):
            case 1:
                _ = 1 // 0
            case 2:
                os.abort()
            case 3:
                time.sleep(60)
            case 4:
                _ = bytearray(2**33)
            case 5:
                raise LongError
            case 6:
                raise SystemExit
            case 7:
                raise UsageError("no")
