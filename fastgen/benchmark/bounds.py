"""What no implementation can beat, timed beside the rivals.

The bound of a case that memory limits is a plain pass over its bytes: one pass of PyTorch for each array
written, by the arrays that the pass reads: a fill (none), a copy (one) or an addition (two). It runs twice:
into memory that is used again (`IN_PLACE`, what the hardware can do), and into new memory (`NEW_MEMORY`, what
an op that returns a new tensor can do: the system has to map and clear its pages, if the allocator cannot
reuse any).

The bounds of a case of matrix products are as many multiply-adds as they have, on registers alone
(`MULTIPLY_ADDS`: what the core can do), and as many reads of the weights as there have to be (`READS`: what
the cache or memory that holds them can do). On the CPU both are loops of fastgen's library with the instruction set in
use; one thread runs its share, so that nothing is lost to waking the others, and the share is taken for the
whole. Where the batch is large the first is longer, where it is small the second; the longer one is the bound.
Half types are multiplied in float32, and bfloat16 by the processor's own instructions where the kernels use them.
On CUDA the multiply-adds are a share of a large product of PyTorch's (with float32 products in full precision), and the
bytes of the case as one copy takes the place of the reads.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from fastgen._load import cpu_library
from fastgen.benchmark import machine
from fastgen.benchmark.case import Case, ProductCase, StreamCase, Traffic
from fastgen.benchmark.timing import interleave, use_threads

__all__ = [
    *("IN_PLACE", "MULTIPLY_ADDS", "NEW_MEMORY", "READS"),
    *("bandwidth", "bounds_of", "finish", "passes", "probes", "share"),
]

IN_PLACE, NEW_MEMORY = "bound", "bound (new memory)"
MULTIPLY_ADDS, READS = "multiply-adds", "weight reads"


def passes(traffic: Traffic, array_bytes: int, *, new_memory: bool, device: str = "cpu") -> Callable[[], object]:
    """A function that reads and writes as many arrays of `array_bytes` as `traffic` says, and little else."""
    count = max(1, array_bytes // 4)
    reads = [torch.ones(count, device=device) for _ in range(traffic.reads)]
    writes: list[Tensor | None] = [
        None if new_memory else torch.ones(count, device=device) for _ in range(traffic.writes)
    ]
    # Two sources at most for each target, spread evenly: 5 reads and 3 writes are 2, 2 and 1.
    sources = [reads[i :: traffic.writes] for i in range(traffic.writes)]
    if any(len(group) > 2 for group in sources):
        raise ValueError(f"traffic: expected at most two reads a write, got {traffic}")

    def one(source: list[Tensor], target: Tensor | None) -> Tensor:
        if len(source) == 2:
            return torch.add(*source, out=target)
        if len(source) == 1:
            return source[0].clone() if target is None else target.copy_(source[0])
        return torch.full((count,), 1.0, device=device) if target is None else target.fill_(1.0)

    return lambda: [one(source, target) for source, target in zip(sources, writes, strict=True)]


def probes(dtype: torch.dtype, flops: int, weights: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """Functions that do `flops` / 2 multiply-adds, and that read (bytes, times) of weights, on one thread."""
    library = cpu_library()
    if library is None:
        return {}
    suffix = {torch.float64: "_double", torch.bfloat16: "_bf16"}.get(dtype, "")
    multiply_adds = getattr(library, f"fastgen_probe_multiply_adds{suffix}")
    reads = library.fastgen_probe_reads
    multiply_adds.restype = reads.restype = ctypes.c_double
    size, times = weights
    memory = torch.ones(max(1, size // 4))
    pointer, elements = ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(memory.numel())
    count, repeats = ctypes.c_int64(flops // 2), ctypes.c_int64(times)

    def read() -> float:
        return float(reads(pointer, elements, repeats)) + float(memory[0])  # which keeps the memory alive

    return {MULTIPLY_ADDS: lambda: multiply_adds(count), READS: read}


_GEMM = 8192  # rows, columns and depth of the product that shows what a GPU can do


def cuda_probes(case: ProductCase) -> dict[str, Callable[[], object]]:
    """A large product, and a copy that moves the bytes of the case."""
    left, right = (torch.randn(_GEMM, _GEMM, device=case.device, dtype=case.dtype) for _ in range(2))
    copy = passes(Traffic(1, 1), case.bytes // 2, new_memory=False, device=case.device)
    return {MULTIPLY_ADDS: lambda: left @ right, READS: copy}


def share(case: Case, name: str) -> float:
    """The share of a bound's call that the case would take: of the large product on a GPU, its multiply-adds."""
    return case.flops / (2 * _GEMM**3) if name == MULTIPLY_ADDS and case.device != "cpu" else 1.0


def bounds_of(case: Case, threads: int) -> dict[str, Callable[[], object]]:
    """The bounds to time beside the rivals of `case`; none of passes where calls cost more than bytes do (L1)."""
    if isinstance(case, ProductCase):
        if case.device != "cpu":
            return cuda_probes(case)
        size, times = case.weights
        return probes(case.dtype, case.flops // threads, (size // threads, times))
    assert isinstance(case, StreamCase)
    if machine.residence(case.bytes, threads, case.device) == "L1":
        return {}
    array = case.elements * case.dtype.itemsize
    return {
        name: passes(case.traffic, array, new_memory=name == NEW_MEMORY, device=case.device)
        for name in (IN_PLACE, NEW_MEMORY)
    }


def finish(device: str) -> Callable[[], object]:
    """Waits for all that the device was given to do."""
    return torch.cuda.synchronize if device != "cpu" else lambda: None


def bandwidth(threads: int, *, array: int = 128 << 20, budget: float = 1.0, device: str = "cpu") -> dict[str, float]:
    """Bytes a second, read and written, of a copy of `array` bytes with `threads` threads, by kind of bound."""
    with use_threads(threads):
        copies = {
            name: passes(Traffic(1, 1), array, new_memory=name == NEW_MEMORY, device=device)
            for name in (IN_PLACE, NEW_MEMORY)
        }
        samples = interleave(copies, budget=budget, finish=finish(device))
    return {name: 2 * array / statistics.median(seconds) for name, seconds in samples.items()}
