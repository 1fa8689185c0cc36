"""Runs cases of one target in this process, which may hang or die of any of them.

    python -m fuzzing.child TARGET FIRST LAST CASE_SECONDS MEMORY_BYTES

Before each case its seed goes to stdout, after it one letter: a(ccepted), r(efused), f(inding) with
a report of one line of JSON. What a case does is decided by its seed alone.
"""

import faulthandler
import json
import os
import random
import resource
import sys
import tempfile
import traceback
from pathlib import Path

from batchllm.errors import BatchLLMError
from fuzzing import targets

MESSAGE_CHARS = 1000


def one_case(target, name, seed):
    """What came of a case: a letter and, of a finding, a report."""
    try:
        target.run(random.Random(f"{name} {seed}"))
    except BatchLLMError as error:
        message = str(error)
        if message and message.isprintable() and len(message) <= MESSAGE_CHARS:
            return "r", ""
        return "f", f"{type(error).__name__} of {len(message)} characters: {message[:300]!r}"
    except BaseException as error:  # a Rust panic is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
        return "f", f"{type(error).__name__}: {str(error)[:300]} at {where}"
    return "a", ""


def main():
    name, first, last, case_seconds, memory = sys.argv[1], *map(int, sys.argv[2:])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    with tempfile.TemporaryDirectory() as scratch:
        target = targets.make(name, Path(scratch))
        with Path("/proc/self/statm").open() as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory,) * 2)
        for seed in range(first, last):
            answers.write(f"{seed} ")
            answers.flush()
            faulthandler.dump_traceback_later(case_seconds, exit=True)
            letter, report = one_case(target, name, seed)
            faulthandler.cancel_dump_traceback_later()
            answers.write(f"{letter} {json.dumps(report)}\n")
            answers.flush()


if __name__ == "__main__":
    faulthandler.enable()
    main()
