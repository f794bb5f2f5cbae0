"""Weights that were published as a pickle, `pytorch_model.bin`, read as plain tensors that safetensors can store.

A pickle is a program. `torch.load(weights_only=True)` runs no command in it and builds only tensors and containers.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minirlhf.common.text import printable
from minirlhf.io.files import check_content

SAFE_TORCH = "2.6"  # up to 2.5 a crafted file could run code in spite of weights_only, CVE-2025-32434
MOST_SHARED = 16  # tensors that share memory may add up to this many times the size of their file


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that `torch.save` wrote, without running any code of the file.

    Raises FileNotFoundError, ValueError if the file is damaged, holds anything but tensors by name or would grow far
    beyond its size, RuntimeError under a PyTorch that cannot read a pickle safely.
    """
    check_content(path)
    if torch.__version__ < SAFE_TORCH:
        raise RuntimeError(
            f"{path} is a pickle, which PyTorch reads safely from {SAFE_TORCH} on, not {torch.__version__}"
        )
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        if isinstance(error, OSError) and error.filename is not None:  # a file that cannot be opened
            raise
        # Not chained: the text of the original error recommends switching the safety off.
        raise ValueError(f"{path} {_complaint(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold tensors by name, but holds a {type(content).__name__}")
    for name, tensor in content.items():
        if isinstance(name, str) and (name == "__metadata__" or any("\ud800" <= char <= "\udfff" for char in name)):
            raise ValueError(f"{path} names a tensor {name!r:.80}, which safetensors cannot")
        if not isinstance(name, str) or not _is_plain(tensor):
            kind = f"{tensor.layout} tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path} must hold plain tensors by name, but {name!r} is a {kind}")
    size, grown = path.stat().st_size, sum(tensor.nbytes for tensor in content.values())
    if grown > MOST_SHARED * size:
        raise ValueError(f"{path} is refused: its {len(content)} tensors share memory and would grow to {grown} bytes")
    return content


def untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors that share no memory, and for each name that was left out the name that holds its tensor.

    Of an embedding and a head that are one tensor, the embedding's name is kept.
    """
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    kept: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    for name in sorted(tensors, key=lambda name: name.startswith(("lm_head.", "cls."))):
        tensor = tensors[name].detach()
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if view in kept and tensor.numel():
            aliases[name] = kept[view]
            continue
        kept[view] = name
        own = storage not in storages and tensor.is_contiguous()
        stored[name] = tensor if own else tensor.clone(memory_format=torch.contiguous_format)
        storages.add(storage)
    return stored, aliases


def _check_archive(path: Path) -> None:
    """Raise ValueError for an archive that unpacks to more than its size: `torch.save` compresses nothing."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # a damaged archive can raise nearly anything
        raise ValueError(f"{path} {_complaint(error)}") from None
    if unpacked > path.stat().st_size:
        raise ValueError(f"{path} is refused: it is compressed and would unpack to {unpacked} bytes")


def _is_plain(tensor: object) -> bool:
    """Whether it is a dense tensor in memory whose storage holds all its elements."""
    return (
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not (tensor.is_conj() or tensor.is_neg())  # views whose memory holds other values
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _complaint(error: Exception) -> str:
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked:
        return f"is refused: it asks to load {printable(asked[1])}, and weights need nothing but tensors"
    return printable(f"is not a readable file of tensors: {type(error).__name__} {str(error).split('. ')[0]}".rstrip())
