from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fastgen.train.memory import _glibc, kept_memory

# In a process of its own, whose heap is in no particular state. Resident bytes, and not page faults: how many pages a
# fault brings is the kernel's choice.
SCRIPT = """
import json, resource
import torch
from fastgen.train.memory import kept_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def use(mebibytes):
    torch.full((mebibytes << 18,), 1.0)

use(1)
start = resident()
with kept_memory():
    use(256)
    inside = resident()
print(json.dumps([inside - start, resident() - start]))
"""


@pytest.mark.skipif(_glibc() is None, reason="another C library than glibc")
def test_freed_memory_is_kept_and_given_back_in_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    inside, afterwards = json.loads(done.stdout)
    assert inside > 250 << 20
    assert afterwards < 64 << 20


def test_what_is_raised_inside_comes_out() -> None:
    with pytest.raises(KeyboardInterrupt), kept_memory():
        raise KeyboardInterrupt
