"""A checkpoint as a folder: a model like any other, and beside it the state of its training. No pickle.

    training.safetensors    tensors: optimizer moments, states of the random generators
    training.json           counters and settings
    manifest.json           SHA-256 of every other file

The folder is replaced as one: a checkpoint is whole or it is not there, and one that the disk has changed since is
noticed. What the tensors and counters mean is their owners' knowledge: `training_state` for PPO, `sft` for stage 1.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minirlhf.io.model_folder import read_tensors, write_tensors
from minirlhf.io.files import read_json, replaced_folder, write_json

STATE_TENSORS, COUNTERS_FILE, MANIFEST_FILE = "training.safetensors", "training.json", "manifest.json"


class DamagedCheckpoint(ValueError):
    """A checkpoint that is not as it was written, or no checkpoint at all."""


def write_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    counters: Mapping[str, Any],
    write_model: Callable[[Path], None],
) -> None:
    """Write a checkpoint in the place of an older one, if there is one.

    counters: "format" says whose checkpoint it is. write_model: writes the model's files into the folder it is given.
    Raises FileExistsError for a folder that holds something else, OSError if it cannot be written.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST_FILE).is_file():
        raise FileExistsError(f"{folder} is not empty, and no checkpoint; choose another folder")
    with replaced_folder(folder) as staged:
        # Before the model, whose index then says that it is not part of it.
        write_tensors(staged / STATE_TENSORS, tensors)
        write_json(staged / COUNTERS_FILE, counters)
        write_model(staged)
        sums = {name: _file_hash(staged / name) for name in _file_names(staged) if name != MANIFEST_FILE}
        write_json(staged / MANIFEST_FILE, {"sha256": sums})


def read_checkpoint(folder: str | os.PathLike[str], format: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and counters of a checkpoint, every byte of it checked, the model's files as well.

    Raises FileNotFoundError if there is no such folder, DamagedCheckpoint, a ValueError, if it is not as it was
    written, ValueError if it has another format than this one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder} does not exist")
    try:
        sums = dict(read_json(folder / MANIFEST_FILE)["sha256"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder} is damaged, or no checkpoint: {error}") from error
    there = _file_names(folder)
    for name, expected in sums.items():
        if name not in there:  # nor is a name followed that leads elsewhere
            raise DamagedCheckpoint(f"{folder} is damaged: {name} is missing")
        if _file_hash(folder / name) != expected:
            raise DamagedCheckpoint(f"{folder} is damaged: {name} is not as it was written")
    if not sums.keys() >= {STATE_TENSORS, COUNTERS_FILE}:
        raise DamagedCheckpoint(f"{folder} is damaged: {MANIFEST_FILE} does not list {COUNTERS_FILE}")
    counters = read_json(folder / COUNTERS_FILE)
    if counters.get("format") != format:
        raise ValueError(f"{folder} has the checkpoint format {counters.get('format')}, this version reads {format}")
    return read_tensors(folder / STATE_TENSORS), counters


def _file_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
