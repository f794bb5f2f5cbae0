"""Weights that were published as a pickle, `pytorch_model.bin`, become safetensors, once.

A pickle is a program: read without care, it can run any command. It is read by `torch.load(weights_only=True)`, which
runs none and builds nothing but tensors and plain containers, and only by a PyTorch whose `weights_only` keeps that
promise. What comes out is written as `model.safetensors` beside it, and from then on the pickle is not opened again.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from minirlhf.io.files import atomic_write
from minirlhf.io.shards import read_shards

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
SAFE_TORCH = "2.6"  # up to 2.5 a crafted file could run code in spite of weights_only, CVE-2025-32434
MOST_SHARED = 16  # times its size that the tensors of a file may have in all, those of shared memory counted each time


def convert(folder: str | os.PathLike[str]) -> Path:
    """The safetensors file of a model folder, written first if the folder has only a pickle.

    Returns the path of `model.safetensors`, or of `model.safetensors.index.json` if that is what is there. Tensors that
    share memory in the pickle (a head tied to the embedding) are stored once; the metadata says under which name.
    Raises FileNotFoundError if there are no weights, ValueError for a pickle that is damaged or needs more than
    tensors, OSError if the folder cannot be written; whatever it raises, nothing is left behind.
    """
    folder = Path(folder)
    for name in (WEIGHTS_FILE, INDEX_FILE):
        if (folder / name).is_file():
            return folder / name
    if (folder / PICKLE_FILE).is_file():
        source, tensors = PICKLE_FILE, read_pickle(folder / PICKLE_FILE)
    elif (folder / PICKLE_INDEX_FILE).is_file():
        source, tensors = PICKLE_INDEX_FILE, read_shards(folder / PICKLE_INDEX_FILE, read_pickle)
    else:
        others = ", ".join((INDEX_FILE, PICKLE_FILE, PICKLE_INDEX_FILE))
        raise FileNotFoundError(f"{folder / WEIGHTS_FILE} does not exist, nor does any of {others}")
    stored, aliases = untied(tensors)
    # "format" is what transformers insists on; the aliases are written as safetensors' own `save_model` does.
    atomic_write(folder / WEIGHTS_FILE, save(stored, metadata={**aliases, "format": "pt", "converted_from": source}))
    return folder / WEIGHTS_FILE


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` made of a state dict, without running any of its code.

    Raises ValueError if it is damaged, holds anything but tensors by name or would grow far beyond its size,
    RuntimeError under a PyTorch that cannot read a pickle safely.
    """
    if torch.__version__ < SAFE_TORCH:
        raise RuntimeError(
            f"{path} is a pickle, which PyTorch reads safely from {SAFE_TORCH} on, not {torch.__version__}"
        )
    if not path.is_file():  # a pipe would be waited for
        raise FileNotFoundError(f"{path} does not exist, or is no file")
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise nearly anything
        if isinstance(error, OSError) and error.filename is not None:  # a file that cannot be opened
            raise
        # Without the original error, whose text recommends to switch the safety off.
        raise ValueError(f"{path} {_complaint(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold tensors by name, but holds a {type(content).__name__}")
    for name, tensor in content.items():
        if isinstance(name, str) and not _is_storable(name):
            raise ValueError(f"{path} names a tensor {name!r:.80}, which safetensors cannot")
        if not isinstance(name, str) or not _is_plain(tensor):
            kind = f"{tensor.layout} tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path} must hold plain tensors by name, but {name!r} is a {kind}")
    size, grown = path.stat().st_size, sum(tensor.nbytes for tensor in content.values())
    if grown > MOST_SHARED * size:
        raise ValueError(f"{path} is refused: its {len(content)} tensors share memory and would grow to {grown} bytes")
    return content


def untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors that share no memory, and for each name that was left out the one that holds its tensor.

    Of the names of one tensor, that of a head gives way: it is the embedding that models keep and tie the head to.
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
    except Exception as error:  # as of a damaged pickle
        raise ValueError(f"{path} {_complaint(error)}") from None
    if unpacked > path.stat().st_size:
        raise ValueError(f"{path} is refused: it is compressed and would unpack to {unpacked} bytes")


def _is_storable(name: str) -> bool:
    """Whether the header of safetensors, JSON in UTF-8, can have an entry of this name besides its metadata."""
    try:
        return name.encode("utf-8") != b"__metadata__"
    except UnicodeEncodeError:
        return False


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
        return f"is refused: it asks to load {asked[1]}, and weights need nothing but tensors"
    return f"is not a readable file of tensors: {type(error).__name__} {str(error).split('. ')[0]}".rstrip()
