"""Adapters on disk, in peft's layout: `adapter_config.json` and `adapter_model.safetensors`.

The metadata of the weights hold the SHA-256 of the base, which peft does not read.

Left out: adapters in a pickle.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minirlhf.io.files import field, naming, read_json, replaced_folder, write_json
from minirlhf.io.model_folder import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    check_tensors,
    read_metadata,
    read_tensors,
    write_tensors,
)
from minirlhf.io.training_state import module_hash
from minirlhf.models.layers import features
from minirlhf.models.lora import LoRALayer, attach, matrices, targeted
from minirlhf.models.lora_config import LoRAConfig

if TYPE_CHECKING:
    from minirlhf.models.decoder import Decoder

PREFIX = "base_model.model."  # of peft's names
HASH = "base_sha256"
PARTS = ("lora_A", "lora_B")
# Variants that peft has and LoRAConfig does not; the first value is what a missing field means.
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    **dict.fromkeys(("use_rslora", "use_dora", "use_qalora", "lora_bias"), (False, None)),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base as well
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({}, None)),
    **dict.fromkeys(("modules_to_save", "layers_to_transform", "exclude_modules", "trainable_token_indices",
                     "target_parameters", "layer_replication", "alora_invocation_tokens"), (None, [])),
}  # fmt: skip


def write_adapter(
    decoder: Decoder,
    folder: str | os.PathLike[str],
    beside: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]] | None = None,
) -> None:
    """Write a decoder's adapters. beside: further safetensors files, as in `model_folder.write_folder`.

    Raises ValueError for a decoder without adapters, OSError if the folder cannot be written; it is unchanged then.
    """
    if decoder.lora is None:
        raise ValueError("the model has no adapters to save; save_pretrained saves the whole model")
    layers = {n: m for n, m in matrices(decoder).items() if isinstance(m, LoRALayer) and m.lora_A is not None}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": decoder.source,
        "r": decoder.lora.rank,
        "lora_alpha": decoder.lora.alpha,
        "lora_dropout": decoder.lora.dropout,
        "target_modules": list(decoder.lora.targets or ()),
        "fan_in_fan_out": any(layer.transposed for layer in layers.values()),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {published_name(decoder, name, part): getattr(m, part) for name, m in layers.items() for part in PARTS}
    with replaced_folder(folder) as staged:
        write_tensors(staged / ADAPTER_FILE, tensors, {HASH: decoder.base_hash})
        for name, (further, metadata) in (beside or {}).items():
            write_tensors(staged / name, further, metadata)
        write_json(staged / ADAPTER_CONFIG_FILE, config)


def published_name(decoder: Decoder, layer: str, part: str) -> str:
    """Peft's name of an adapter's matrix."""
    return f"{PREFIX}{decoder.prefix}{layer}.{part}.weight"


def read_adapter(decoder: Decoder, folder: Path) -> None:
    """Give a decoder without adapters those of a folder.

    Raises ValueError, before the decoder is changed, for a variant that is not supported, tensors that do not fit, or
    an adapter that was trained on another base; FileNotFoundError for a missing file.
    """
    config_path, path = folder / ADAPTER_CONFIG_FILE, folder / ADAPTER_FILE
    content, tensors = read_json(config_path), read_tensors(path)
    for name, values in FIXED.items():
        if content.get(name, values[0]) not in values:
            raise ValueError(f"{config_path} has {name}={content[name]!r:.80}; only {values[0]!r} is supported")
    if decoder.lora is not None:
        raise ValueError(f"{folder} holds adapters, and the base given for them has some already")
    targets: Any = content.get("target_modules")
    if not isinstance(targets, list):  # a pattern: the tensors say which layers it meant
        targets = [n for n in matrices(decoder) if published_name(decoder, n, "lora_A") in tensors]
    targets = [name.removeprefix(decoder.prefix) if isinstance(name, str) else name for name in targets]
    rank = field(content, "r", int, config_path, 8)
    with naming(config_path):
        config = LoRAConfig(rank, content.get("lora_alpha", 8), content.get("lora_dropout", 0.0), tuple(targets))
        layers = targeted(decoder, config.targets or ())
    places: dict[str, tuple[str, str]] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        n_in, n_out = features(layer)
        for part, shape in (("lora_A", (rank, n_in)), ("lora_B", (n_out, rank))):
            published = published_name(decoder, name, part)
            places[published], expected[published] = (name, part), shape
    check_tensors(tensors, expected, path)
    began, given = read_metadata(path).get(HASH), decoder.base_hash or module_hash(decoder)
    if began not in (None, given):
        found = f"its tensors had the SHA-256 {began[:12]}..., those of {decoder.source or 'the one given'} have"
        raise ValueError(f"{folder} holds adapters for another base: {found} {given[:12]}...")
    attach(decoder, config)
    with torch.no_grad():
        for published, (name, part) in places.items():
            getattr(decoder.get_submodule(name), part).copy_(tensors[published])
