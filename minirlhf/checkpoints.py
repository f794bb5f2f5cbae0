"""Model folders in the Hugging Face layout: `config.json` and `model.safetensors` to and from a dict and tensors.

This module knows files, names and tensors, and no model. A model hands in the names and shapes that it expects
(`check_tensors`) and gets back exactly those tensors, or one error that lists everything that is wrong.

Left out: pickled `pytorch_model.bin`, sharded files and downloads.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError, or ValueError with the path if it is not a JSON object."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    return content


def read_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read `config.json` and `model.safetensors` of a model folder.

    Returns the config as a dict and the tensors by name, as stored.
    Raises FileNotFoundError for a missing folder or file, ValueError for a damaged one; both name the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    config = read_json(folder / CONFIG_FILE)
    return config, read_tensors(folder / WEIGHTS_FILE)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a safetensors file. Raises FileNotFoundError, or ValueError with the path for a damaged file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text metadata of a safetensors file. Raises ValueError with the path for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], origin: str | os.PathLike[str]
) -> None:
    """Compare names, shapes and values with what a model expects.

    tensors: name -> tensor, names already in the model's own form.
    expected: name -> shape.
    Raises one ValueError that lists missing and unexpected names, wrong shapes, non-float and non-finite tensors.
    """
    problems = [f"missing {name} {tuple(shape)}" for name, shape in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"unexpected {name} {tuple(tensor.shape)}")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the config asks for {tuple(expected[name])}")
        elif not tensor.is_floating_point():
            problems.append(f"{name} has dtype {tensor.dtype}, expected a floating-point type")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} holds NaN or infinite values")
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"the weights in {origin} do not fit the model: {shown}")


def check_published(
    content: Mapping[str, Any], folder: str | os.PathLike[str], model_type: str, fixed: Mapping[str, Any]
) -> None:
    """Raise ValueError if a published config is of another model, or asks for a variant that is not supported.

    fixed: field -> the only supported value, which is also what a missing field means.
    """
    if content.get("model_type", model_type) != model_type:
        raise ValueError(f"{folder} holds a {content['model_type']!r} model, expected {model_type!r}")
    for name, value in fixed.items():
        if content.get(name, value) != value:
            raise ValueError(f"{folder}: config.json has {name}={content[name]!r}; only {value!r} is supported")


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in another floating-point type. Raises ValueError for a value that it cannot hold."""
    if not dtype.is_floating_point:
        raise ValueError(f"weights are stored in a floating-point type, got {dtype}")
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds values that {dtype} cannot hold: up to {tensors[name].abs().max()}")
    return stored


def write_folder(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `model.safetensors`, then `config.json`, each atomically; other files of the folder stay.

    Tied tensors must be given once. Raises OSError if the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_FILE, tensors, metadata)
    write_json(folder / CONFIG_FILE, config)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, atomically."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # transformers refuses a file whose metadata lacks "format".
    atomic_write(path, save(on_cpu, metadata={"format": "pt", **(metadata or {})}))


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically, in UTF-8 with sorted keys left as given."""
    atomic_write(path, (json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n").encode("utf-8"))


def atomic_write(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    The content goes to a temporary file in the same folder, is flushed to the disk and renamed over the target.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only the owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
