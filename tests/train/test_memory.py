from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fastgen.train.memory import _glibc, kept_memory

# In a process of its own, whose heap is in no particular state.
SCRIPT = """
import json, resource
import torch
from fastgen.train.memory import kept_memory

def page_faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        torch.full((16 << 20,), 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with kept_memory():
    page_faults(1)
    inside = page_faults(8)
print(json.dumps([inside, page_faults(8), (64 << 20) // resource.getpagesize()]))
"""


@pytest.mark.skipif(_glibc() is None, reason="another C library than glibc")
def test_freed_memory_is_used_again_and_given_back_in_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    inside, afterwards, pages = json.loads(done.stdout)
    assert inside < 2 * pages
    assert afterwards > 7 * pages


def test_what_is_raised_inside_comes_out() -> None:
    with pytest.raises(KeyboardInterrupt), kept_memory():
        raise KeyboardInterrupt
