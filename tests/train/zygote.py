"""Runs `fastgen` in child processes that start at once, since they are forked from one that has imported everything.

Each line of stdin is a JSON object {"arguments": [...], "kill_after": seconds or null, "die": n or null}; the answer
is the child's wait status. With "die" the child kills itself in the middle of writing its n-th checkpoint.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time

import accelerate  # noqa: F401
import matplotlib.figure
import PIL.Image  # noqa: F401
import safetensors.torch
import torch
import torch._dynamo

from fastgen.cli import main


def die_in_checkpoint(number: int) -> None:
    write, count = safetensors.torch.save_file, 0

    def half(tensors, path, metadata=None):
        nonlocal count
        write(tensors, path, metadata)
        if "step-" in str(path):
            count += 1
            if count == number:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    safetensors.torch.save_file = half


def wait(child: int, seconds: float | None) -> int:
    """The wait status of `child`, which is killed after `seconds`."""
    if seconds is not None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (ended := os.waitpid(child, os.WNOHANG)) != (0, 0):
                return ended[1]
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


torch.set_num_threads(1)
matplotlib.figure.Figure().savefig(io.BytesIO())  # finds the fonts
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        if request["die"]:
            die_in_checkpoint(request["die"])
        try:
            code = main(request["arguments"])
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            code = 70
        sys.stderr.flush()
        os._exit(code)
    print(wait(child, request["kill_after"]), flush=True)
