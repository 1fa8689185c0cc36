"""A builder of prompts that processes die of; apart from tests, whose imports take them seconds."""

import os
import signal

from batchllm.text.prompts import PromptBuilder


class Deadly(PromptBuilder):
    """Its process dies of every row whose text is `deadly`, and where it may not live at all."""

    def build(self, table):
        if str(os.getpid()) != os.environ["TEST_PROCESS"] and "deadly" in table["t"].to_pylist():
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().build(table)

    def __reduce__(self):
        return Deadly, (self._spec, self._tokenizer, 60)
