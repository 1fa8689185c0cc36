"""What children do in tests: `python -m child_bodies`; the first message says which."""

import os
import time

from batchllm.child import run_child
from batchllm.errors import UsageError


def body(parent):
    while True:
        match parent.receive():
            case "echo", message:
                print("this is no message")
                parent.send(message)
            case "die", number:
                os.kill(os.getpid(), number)
            case "exit":
                os._exit(3)
            case "refuse":
                raise UsageError("heads cannot be divided")
            case "bug":
                raise KeyError("a bug")
            case "sleep":
                parent.send("good night")
                time.sleep(1000)


if __name__ == "__main__":
    run_child(body)
