"""Tensors of which each process holds a part (torch's DTensor). Ordinary ones are returned as they are."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def is_part(x: Tensor) -> bool:
    """Whether this process holds only a part of a tensor."""
    return hasattr(x, "full_tensor")


def full(x: Tensor) -> Tensor:
    """The whole tensor; all processes must call it."""
    return x.full_tensor() if is_part(x) else x  # type: ignore[attr-defined]


def as_part(x: Tensor, like: Tensor) -> Tensor:
    """x, which all processes have, cut as `like`."""
    if not is_part(like) or is_part(x):
        return x
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(x.to(like.device), mesh, placements, src_data_rank=None)


def save_parts(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the parts of all processes, which must all call it, as safetensors (torch.distributed.checkpoint)."""
    import torch.distributed.checkpoint as dcp

    folder.mkdir(exist_ok=True)
    dcp.save(dict(tensors), storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))


def load_parts(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `save_parts` wrote, by any number of processes, cut as the tensors of these names."""
    import torch.distributed.checkpoint as dcp

    found = {name: torch.empty_like(x.detach()) for name, x in like.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: "assuming the intent is to load in a single process", as it is
        dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    return found
