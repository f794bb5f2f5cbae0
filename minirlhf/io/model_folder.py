"""Model folders in the Hugging Face layout: `config.json` and `model.safetensors` to and from a dict and tensors.

This module is independent of the models, which pass the names and shapes that they expect to `check_tensors`.

Left out: writing in shards.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from minirlhf.common.text import printable
from minirlhf.device.parts import is_part
from minirlhf.io.conversion import read_pickle, untied
from minirlhf.io.files import (
    StrPath,
    atomic_write,
    check_content,
    field,
    read_json,
    replaced_folder,
    sha256,
    write_json,
)
from minirlhf.io.hub import locate
from minirlhf.io.model_card import ModelCard, Origin, write_card
from minirlhf.io.shards import read_index, read_shards

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
ADAPTER_CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"  # of peft
WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Keys that say that the weights are not those of a dense language model in a floating-point type.
QUANTISED = ("quantization_config", "compression_config")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
MULTIMODAL = ("vision_config", "text_config", "audio_config")
# Keys of a loaded config.json that do not hold of what is saved: how it was stored, by whom, and code beside it.
NOT_KEPT = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "num_labels", "_num_labels", "auto_map"}
# What training wrappers put into a tensor's name: torch.compile, fully sharded and checkpointed modules anywhere, then
# DataParallel, Lightning, TRL, peft and DeepSpeed at the start.
INNER_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
OUTER_WRAPPERS = re.compile(r"^(?:(?:module|model|pretrained_model|base_model|_forward_module)\.)+")


def read_folder(folder: StrPath) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config of a model folder and its tensors by name, as stored: safetensors, whole or sharded, or a pickle.

    folder: or the name of a model that was downloaded (see `hub`).
    Raises FileNotFoundError for a missing folder or file, ValueError for a damaged one; both name the file.
    """
    folder = locate(folder)
    if (folder / ADAPTER_CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder} holds LoRA adapters; minirlhf.load_decoder({str(folder)!r}) loads their base too")
    return read_json(folder / CONFIG_FILE), read_weights(folder)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder. A pickle is converted as in `convert`, or in memory if the folder cannot be written."""
    weights = _readable(folder)
    if weights is None:
        tensors, metadata = _from_pickle(folder)
        try:
            write_tensors(folder / WEIGHTS_FILE, tensors, metadata)
        except OSError as error:
            problem = f"{folder} cannot be written ({error.strerror or error})"
            source = metadata["converted_from"]
            warnings.warn(f"{problem}, so {source} is converted in memory each time it is loaded", stacklevel=2)
        return tensors
    return read_shards(weights, read_tensors) if weights.name == INDEX_FILE else read_tensors(weights)


def convert(folder: StrPath) -> Path:
    """The safetensors file of a model folder, or its index; converts a pickle first that is alone or newer.

    Tensors that share memory in the pickle (a head tied to the embedding) are stored once. The metadata names the
    others, and records size, times and SHA-256 of the converted files: if they change, they are converted anew.
    Raises FileNotFoundError if there are no weights, ValueError as `read_pickle`, OSError if the folder cannot be
    written; it is unchanged then.
    """
    folder = Path(folder)
    weights = _readable(folder)
    if weights is None:
        weights = folder / WEIGHTS_FILE
        write_tensors(weights, *_from_pickle(folder))
    return weights


def _readable(folder: Path) -> Path | None:
    """The safetensors file or index of a folder, None if a pickle has to be converted."""
    weights, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    conversion = _conversion(weights)
    if weights.is_file() and conversion is None:
        return weights
    if _is_there(index):  # it came after a conversion, which is made only without an index
        return index
    return None if conversion is None or _is_stale(folder, conversion) else weights


def _conversion(weights: Path) -> dict[str, str] | None:
    """The metadata of a file that is our conversion of a pickle, else None."""
    try:
        metadata = read_metadata(weights)
    except (FileNotFoundError, ValueError):  # not ours; loading it raises the error
        return None
    return metadata if "converted_from" in metadata else None


def _is_stale(folder: Path, metadata: Mapping[str, str]) -> bool:
    """Whether the pickle of a conversion with this metadata was replaced since; not if it was deleted.

    Raises FileNotFoundError if only a part of the pickle is there, which tells nothing about the rest.
    """
    sources = _pickle_files(folder)
    if not sources:
        return False
    if absent := [path for path in sources if not path.is_file()]:
        remedy = f"bring it, or remove {sources[0].name} to load {WEIGHTS_FILE}, which was converted before"
        raise FileNotFoundError(f"{absent[0]} does not exist, or is not a file; {remedy}")
    try:
        recorded = json.loads(metadata["sources"])
        same_names = recorded.keys() == {path.name for path in sources}
        return not (same_names and all(_is_unchanged(path, recorded[path.name]) for path in sources))
    except (ValueError, KeyError, AttributeError, RecursionError):  # no record, or a damaged one
        return True


def _is_unchanged(path: Path, recorded: Any) -> bool:
    """Whether a file is the recorded one: by size and times, or by its hash if only the times differ (a copy)."""
    if not isinstance(recorded, dict) or recorded.get("size") != path.stat().st_size:
        return False
    return recorded.get("times") == _times(path) or recorded.get("sha256") == sha256(path)


def _times(path: Path) -> list[int]:
    """When content and inode of a file last changed, ns. The second cannot be set back by `touch` or `cp -p`."""
    found = path.stat()
    return [found.st_mtime_ns, found.st_ctime_ns]


def _pickle_files(folder: Path) -> list[Path]:
    """The pickle of a folder, or its index and shards; empty if there is none. Raises ValueError for a bad index."""
    if _is_there(folder / PICKLE_FILE):
        return [folder / PICKLE_FILE]
    index = folder / PICKLE_INDEX_FILE
    return [index, *(folder / name for name in read_index(index))] if _is_there(index) else []


def _is_there(path: Path) -> bool:
    """Whether a path is a file or a link. A broken link is not passed over: reading it raises the error."""
    return path.is_file() or path.is_symlink()


def _from_pickle(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a pickle, and the metadata of their conversion. Raises as `convert`."""
    sources = _pickle_files(folder)
    if not sources:
        others = ", ".join((INDEX_FILE, PICKLE_FILE, PICKLE_INDEX_FILE))
        raise FileNotFoundError(f"{folder / WEIGHTS_FILE} does not exist, nor does any of {others}")
    recorded = {
        path.name: {"size": path.stat().st_size, "times": _times(path), "sha256": sha256(path)}
        for path in sources
        if path.is_file()  # else reading it raises the error
    }
    whole = sources[0].name == PICKLE_FILE
    tensors, aliases = untied(read_pickle(sources[0]) if whole else read_shards(sources[0], read_pickle))
    # The aliases are written as safetensors' own `save_model` writes them.
    return tensors, {**aliases, "format": "pt", "converted_from": sources[0].name, "sources": json.dumps(recorded)}


def read_tensors(path: StrPath) -> dict[str, Tensor]:
    """Read a safetensors file. Raises FileNotFoundError, or ValueError with the path for a damaged file."""
    check_content(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {printable(str(error))}") from error


def read_metadata(path: StrPath) -> dict[str, str]:
    """The text metadata of a safetensors file. Raises as `read_tensors`."""
    check_content(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {printable(str(error))}") from error


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], origin: StrPath) -> None:
    """Raise one ValueError that lists missing and unexpected names, wrong shapes, types and values not finite in fp32.

    tensors: name -> tensor, names already in the model's own form. expected: name -> shape.
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
        missing = [problem for problem in problems if problem.startswith("missing ")]
        others = problems[len(missing) :]
        shown = [*missing[: max(10, 20 - len(others))], *others[: max(10, 20 - len(missing))]]
        more = f"; and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise ValueError(f"the weights in {origin} do not fit the model: {printable('; '.join(shown))}{more}")


def renamed(tensors: Mapping[str, Tensor], own_name: Callable[[str], str | None], origin: StrPath) -> dict[str, Tensor]:
    """Tensors under a model's own names. Raises ValueError if two tensors get one name.

    own_name: from a published name, without the prefixes of training wrappers and with LayerNorm's gamma and beta as
        weight and bias, to the model's own; None for a tensor that the model does not hold.
    """
    named: dict[str, Tensor] = {}
    for published, tensor in tensors.items():
        bare = OUTER_WRAPPERS.sub("", INNER_WRAPPERS.sub("", published))
        own = own_name(re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", bare)))
        if own in named:
            raise ValueError(printable(f"the weights in {origin} hold {own} twice, once as {published}"))
        if own is not None:
            named[own] = tensor
    return named


def check_supported(content: Mapping[str, Any], folder: StrPath) -> None:
    """Raise ValueError, with the field and what to do, for weights that are quantised, of experts, or of images."""
    for name, value in content.items():
        where = f"{folder}: {CONFIG_FILE} has {name}={value!r:.80}"
        if name in QUANTISED and value is not None:
            found = value.get("quant_method", "unknown") if isinstance(value, Mapping) else "unknown"
            method = printable(str(found)[:40])
            raise ValueError(f"{where}: weights quantised by {method} are not supported; use the folder of the "
                             "same model in bf16, fp16 or fp32")  # fmt: skip
        experts = name in EXPERTS and value not in (None, 0, 1)
        if experts or (name == "model_type" and isinstance(value, str) and (value == "mixtral" or "moe" in value)):
            raise ValueError(f"{where}: a mixture of experts is not supported; use a dense model")
        if name in MULTIMODAL and value is not None:
            raise ValueError(f"{where}: a multimodal model is not supported; use the text-only model of the family")


def check_published(
    content: Mapping[str, Any],
    folder: StrPath,
    model_type: str | tuple[str, ...],
    fixed: Mapping[str, tuple[Any, ...]],
    remedy: str = "",
) -> None:
    """Raise ValueError if a published config is of another model, or asks for a variant that is not supported.

    model_type: or the supported ones, of which the first is what a missing one means.
    fixed: field -> the supported values, of which the first is what a missing field means.
    remedy: what to do with another model, for the error.
    """
    check_supported(content, folder)
    supported = (model_type,) if isinstance(model_type, str) else model_type
    found = field(content, "model_type", str, f"{folder}: {CONFIG_FILE}", supported[0])
    if found not in supported:
        raise ValueError(f"{folder} holds a {found!r} model, expected {' or '.join(map(repr, supported))}{remedy}")
    for name, values in fixed.items():
        if content.get(name, values[0]) not in values:
            allowed = " or ".join(repr(value) for value in values)
            raise ValueError(f"{folder}: {CONFIG_FILE} has {name}={content[name]!r:.80}; only {allowed} is supported")


def published_config(content: Mapping[str, Any], origin: Origin | None) -> dict[str, Any]:
    """A `config.json` to write: its own content, and what the loaded one said besides that still holds."""
    loaded = origin.config if origin else {}
    return {**content, **{name: loaded[name] for name in loaded if name not in content and name not in NOT_KEPT}}


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors in another floating-point type. Raises ValueError for a value that the type cannot hold."""
    if dtype not in WEIGHT_TYPES:
        raise ValueError(f"weights are stored as one of {', '.join(map(str, WEIGHT_TYPES))}, got {dtype}")
    if any(map(is_part, tensors.values())):
        raise ValueError("the model is sharded: save it by trainer.save_pretrained(folder), on all processes")
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds values that {dtype} cannot hold: up to {tensors[name].abs().max()}")
    return stored


def write_folder(
    folder: StrPath,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    card: ModelCard | None = None,
    beside: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]] | None = None,
) -> None:
    """Write a model to `config.json`, `model.safetensors` and `README.md`, all at one moment.

    tensors: tied ones must be given once. card: also the metadata of the weights; None: no card.
    beside: further safetensors files, name -> (tensors, metadata).
    Other files of the folder stay, also a README.md that is not ours; but shards of an older model, and adapters, are
    removed, since other tools would read them. Raises OSError if the folder cannot be written; it is unchanged then.
    """
    with replaced_folder(folder) as staged:
        names = (INDEX_FILE, ADAPTER_CONFIG_FILE, ADAPTER_FILE)
        for old in [*staged.glob("model-*-of-*.safetensors"), *(staged / name for name in names)]:
            old.unlink(missing_ok=True)
        write_tensors(staged / WEIGHTS_FILE, tensors, card.metadata() if card else None)
        for name, (further, metadata) in (beside or {}).items():
            write_tensors(staged / name, further, metadata)
        if len(list(staged.glob("*.safetensors"))) > 1:
            # vLLM and SGLang load every safetensors file of a folder, unless an index says which are the model's.
            size = sum(tensor.nbytes for tensor in tensors.values())
            placed = dict.fromkeys(sorted(tensors), WEIGHTS_FILE)
            write_json(staged / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": placed})
        write_json(staged / CONFIG_FILE, config)
        if card is not None:
            write_card(staged, card)


def write_tensors(path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, atomically; equal content gives equal bytes."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # transformers refuses a file whose metadata lacks "format".
    raw = save(on_cpu, metadata={"format": "pt", **(metadata or {})})
    end = 8 + int.from_bytes(raw[:8], "little")  # of the header, JSON whose metadata safetensors writes in any order
    header = json.loads(raw[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(dict(sorted(header.items())), separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    atomic_write(path, len(text).to_bytes(8, "little"), text, memoryview(raw)[end:])
