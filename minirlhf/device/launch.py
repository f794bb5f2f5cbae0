"""Processes that torchrun started: how they find each other, and which one tells an error that all have."""

from __future__ import annotations

import atexit
import datetime
import hashlib
import os
import sys
from types import TracebackType

import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(days=7)  # of an exchange: a reward may be a person; torchrun notices a dead process


def started_together() -> bool:
    """Whether torchrun (or the like) started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether torchrun started these processes again after one of them died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def tells(error: BaseException) -> bool:
    """Whether this process is the first to tell this error, so that one of W processes shows it."""
    if not _stores:
        return True
    words = str(error).encode("utf-8", "backslashreplace")
    try:
        return bool(_stores[0].add(f"told {hashlib.sha256(words).hexdigest()}", 1) == 1)
    except RuntimeError:  # the store ended with the process that held it
        return True


_stores: list[dist.Store] = []  # the one that the processes joined by


def join() -> None:
    """Start the process group."""
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":  # torchrun keeps the store, and the addresses of dead processes
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    _stores[:] = [store]
    atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    sys.excepthook = _told_once


def _told_once(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if tells(error):
        sys.__excepthook__(kind, error, where)


def require_nccl(backends: str) -> None:
    """Raise ValueError unless GPU tensors are exchanged by NCCL. backends: as "cpu:gloo,cuda:nccl"."""
    if "cuda:nccl" not in backends.split(","):
        advice = "let minirlhf start the process group, or use init_process_group('cpu:gloo,cuda:nccl')"
        raise ValueError(f"the process group exchanges GPU tensors by {backends!r}, not by NCCL; {advice}")
