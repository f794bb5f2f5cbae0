"""What makes the same arithmetic faster on a CPU: the faster matrix library, kept memory, no idle threads."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # in a container its own group's: "quota period" or "max period", in us
MATMULS = ("default", "onednn")
MATMUL_FLOP = 6e8  # of one timed product: a few milliseconds
MATMUL_GAIN = 0.97  # oneDNN's time must be below this share of the default's


@contextlib.contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    """A context in which `torch.set_float32_matmul_precision(setting)` holds; afterwards the setting is as before.

    A user's own `torch.backends.*.fp32_precision`, which PyTorch does not mix with it, stays.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # a mix of both
        yield
        return
    try:
        torch.set_float32_matmul_precision(setting)
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def onednn_matmul() -> contextlib.AbstractContextManager[None]:
    """A context in which fp32 matrix products go through oneDNN instead of MKL, with the same rounding.

    PyTorch takes oneDNN where products of "medium" precision are allowed and the CPU has AVX-512 or more. Without it,
    and where these products round more than fp32 (CPUs with AMX compute them in bf16), nothing changes.
    """
    return matmul_precision("medium") if _offers_onednn() else contextlib.nullcontext()


@functools.cache
def fastest_matmul(n_in: int, n_out: int) -> str:
    """The library, of MATMULS, that multiplies faster by a matrix (n_in, n_out) here; timed once a process.

    oneDNN needs 10 to 20% less time than MKL with AVX-512; with AVX2 PyTorch has no way to it. Both are timed in turns,
    and the best of four turns counts, within about 50 ms.
    """
    if not _offers_onednn():
        return "default"
    rows = max(1, min(512, round(MATMUL_FLOP / (2 * n_in * n_out))))
    x, weight = torch.ones(rows, n_in), torch.ones(n_in, n_out)
    best = dict.fromkeys(MATMULS, math.inf)
    for turn in range(5):  # the first one makes the kernels
        for name in MATMULS:
            with onednn_matmul() if name == "onednn" else contextlib.nullcontext():
                start = time.perf_counter()
                x @ weight
                seconds = time.perf_counter() - start
            best[name] = min(best[name], seconds if turn else math.inf)
    return "onednn" if best["onednn"] < MATMUL_GAIN * best["default"] else "default"


def onednn_has_bf16() -> bool:
    """Whether oneDNN takes products in bf16 on this CPU: any with AVX-512, where it computes them by way of fp32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def _offers_onednn() -> bool:
    """Whether a product of "medium" precision goes through oneDNN, and is measured to be as exact as any in fp32."""
    if not onednn_has_bf16():
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 256, 256, generator=generator)[i] for i in (0, 1))
    with matmul_precision("medium"):
        error = ((a @ b).double() - a.double() @ b.double()).abs().max()
    return bool(error < 1e-4)  # of sums of 256 products; about 2e-5 in fp32, 0.1 in bf16


@functools.cache
def keep_freed_memory() -> bool:
    """Let the allocator keep freed memory for the next step, which asks for the same again; for the whole process.

    By default glibc gives large blocks back to the system at once, and every new one costs a page fault for each 4 KiB.
    Returns whether the allocator is glibc's, which alone can be asked.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1)))


@functools.cache
def limit_threads() -> int | None:
    """Let PyTorch start no more threads than a container's quota (`cpu.max` of its control group) has time for.

    PyTorch starts one a core that it sees. With a quota of fewer cores all of them are stopped together once it is
    used up, and the threads that are done wait for those that are not. The quota is rounded up.
    A number that OMP_NUM_THREADS, MKL_NUM_THREADS or `torch.set_num_threads` set stays.
    Returns the new number; None: the old one stays.
    """
    try:
        quota, period = (int(x) for x in CPU_MAX.read_text().split())
        allowed, cores = -(-quota // period), len(os.sched_getaffinity(0))
    except (OSError, ValueError, ZeroDivisionError, AttributeError):  # no such file, or "max"
        return None
    threads = torch.get_num_threads()
    by_itself = threads in (cores, cores // 2)  # PyTorch takes half of them with two threads to a core
    if os.environ.keys() & {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} or not by_itself or threads <= allowed:
        return None
    torch.set_num_threads(allowed)
    return allowed
