"""Model folders in the Hugging Face layout: `config.json` and `model.safetensors` to and from a dict and tensors.

This module knows files, names and tensors, and no model. A model hands in the names and shapes that it expects
(`check_tensors`) and gets back exactly those tensors, or one error that lists everything that is wrong.

Left out: downloads, and writing in shards: what is written is one file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from minirlhf.io.conversion import INDEX_FILE, WEIGHTS_FILE, convert
from minirlhf.io.files import atomic_write, read_json, replaced_folder, write_json
from minirlhf.io.hub import locate
from minirlhf.io.model_card import ModelCard, Origin, write_card
from minirlhf.io.shards import read_shards

CONFIG_FILE = "config.json"
WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Keys of a loaded config.json that do not hold of what is saved: how it was stored, by whom, and code beside it.
NOT_KEPT = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "num_labels", "_num_labels", "auto_map"}


def read_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read `config.json` and the weights of a model folder: safetensors, whole or sharded, or a pickle, converted once.

    folder: or the name of a model that was downloaded (see `hub`).
    Returns the config as a dict and the tensors by name, as stored.
    Raises FileNotFoundError for a missing folder or file, ValueError for a damaged one; both name the file.
    """
    folder = locate(folder)
    config = read_json(folder / CONFIG_FILE)
    weights = convert(folder)
    return config, read_shards(weights, read_tensors) if weights.name == INDEX_FILE else read_tensors(weights)


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
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], origin: str | os.PathLike[str]
) -> None:
    """Compare names, shapes and values with what a model expects.

    tensors: name -> tensor, names already in the model's own form.
    expected: name -> shape.
    Raises one ValueError that lists missing and unexpected names, wrong shapes, other types than floating point, and
    values that are not finite in fp32.
    """
    problems = [f"missing {name} {tuple(shape)}" for name, shape in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            problems.append(f"unexpected {name} {tuple(tensor.shape)}")
        elif tensor.shape != expected[name]:
            transposed = " (it is transposed)" if tensor.shape == expected[name][::-1] else ""
            shapes = f"{tuple(tensor.shape)}, the config asks for {tuple(expected[name])}"
            problems.append(f"{name} has shape {shapes}{transposed}")
        elif tensor.dtype not in WEIGHT_TYPES:
            problems.append(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, WEIGHT_TYPES))}")
        elif not torch.isfinite(tensor.float()).all():
            problems.append(f"{name} holds NaN or infinite values")
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"the weights in {origin} do not fit the model: {shown}")


def renamed(
    tensors: Mapping[str, Tensor], own_name: Callable[[str], str | None], origin: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """Tensors under a model's own names.

    own_name: a published name in the model's form, None for a tensor that the model does not hold. The old names of
        LayerNorm's parameters, gamma and beta, are read as weight and bias.
    Raises ValueError if two tensors get one name.
    """
    named: dict[str, Tensor] = {}
    for published, tensor in tensors.items():
        own = own_name(re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", published)))
        if own in named:
            raise ValueError(f"the weights in {origin} hold {own} twice, once as {published}")
        if own is not None:
            named[own] = tensor
    return named


def check_published(
    content: Mapping[str, Any], folder: str | os.PathLike[str], model_type: str, fixed: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raise ValueError if a published config is of another model, or asks for a variant that is not supported.

    fixed: field -> the supported values, of which the first is what a missing field means.
    """
    if content.get("model_type", model_type) != model_type:
        raise ValueError(f"{folder} holds a {content['model_type']!r} model, expected {model_type!r}")
    for name, values in fixed.items():
        if content.get(name, values[0]) not in values:
            supported = " or ".join(repr(value) for value in values)
            raise ValueError(f"{folder}: config.json has {name}={content[name]!r}; only {supported} is supported")


def published_config(content: Mapping[str, Any], origin: Origin | None) -> dict[str, Any]:
    """A `config.json` to write: its own content, and what the loaded one said besides that still holds."""
    loaded = {} if origin is None else origin.config
    return {**content, **{name: loaded[name] for name in loaded if name not in content and name not in NOT_KEPT}}


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in another floating-point type. Raises ValueError for a value that it cannot hold."""
    if dtype not in WEIGHT_TYPES:
        raise ValueError(f"weights are stored as one of {', '.join(map(str, WEIGHT_TYPES))}, got {dtype}")
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds values that {dtype} cannot hold: up to {tensors[name].abs().max()}")
    return stored


def write_folder(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: ModelCard | None = None,
    beside: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]] | None = None,
) -> None:
    """Write a model to `config.json`, `model.safetensors` and `README.md`, all at one moment.

    tensors: tied ones must be given once. card: also the metadata of the weights; None: no card.
    beside: further safetensors files, name -> (tensors, metadata).
    Other files of the folder stay, also a README.md that is not ours; but shards of an older model go, as other tools
    would read them as part of this one. Raises OSError if the folder cannot be written; it is as it was then.
    """
    with replaced_folder(folder) as staged:
        for old in [*staged.glob("model-*-of-*.safetensors"), staged / INDEX_FILE]:
            old.unlink(missing_ok=True)
        write_tensors(staged / WEIGHTS_FILE, tensors, card.metadata() if card else None)
        for name, (further, metadata) in (beside or {}).items():
            write_tensors(staged / name, further, metadata)
        if len(list(staged.glob("*.safetensors"))) > 1:
            # vLLM and SGLang load every safetensors file of a folder, unless an index says which are the model's.
            size = sum(tensor.nbytes for tensor in tensors.values())
            write_json(
                staged / INDEX_FILE,
                {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(tensors), WEIGHTS_FILE)},
            )
        write_json(staged / CONFIG_FILE, config)
        if card is not None:
            write_card(staged, card)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, atomically."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # transformers refuses a file whose metadata lacks "format".
    atomic_write(path, save(on_cpu, metadata={"format": "pt", **(metadata or {})}))
