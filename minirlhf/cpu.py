"""What makes the same arithmetic faster on a CPU: a matrix library that is, and memory that is kept."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


@contextlib.contextmanager
def fast_matmul() -> Iterator[None]:
    """Within it fp32 matrix products go through oneDNN, which needs 10 to 20% less time for them than MKL.

    PyTorch takes oneDNN if products of "medium" precision are allowed. Where it would really round more (CPUs with
    AMX compute them in bf16), nothing is changed. The setting is PyTorch's global one; afterwards it is as before. Who
    sets the newer `torch.backends.*.fp32_precision`, which PyTorch does not mix with it, keeps what was set.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # a mix of both
        yield
        return
    try:
        if _medium_is_full():
            torch.set_float32_matmul_precision("medium")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def _medium_is_full() -> bool:
    """Whether a product of "medium" precision is as exact as any in fp32, which is measured."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 256, 256, generator=generator)[i] for i in (0, 1))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        error = ((a @ b).double() - a.double() @ b.double()).abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    return bool(error < 1e-4)  # of sums of 256 products; about 2e-5 in fp32, 0.1 in bf16


@functools.cache
def keep_freed_memory() -> bool:
    """Let the allocator keep what is freed for the next step, which asks for the same again; for the whole process.

    By default glibc gives large blocks back to the system at once, and every new one costs a page fault for each 4 KiB.
    Returns whether it was set: with glibc it is, other allocators (jemalloc by LD_PRELOAD, say) do as they are set.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1)))
