"""LoRA: thin trained matrices beside the frozen matrices of a decoder's blocks (Hu et al. 2021, equation 3).

    y = x W + b + alpha / rank * dropout(x) A^T B^T,     x (..., in), A (rank, in), B (out, rank)

B begins at 0, so a fresh adapter changes no bit of what the model computes. Dropout acts in training mode, which is
SFT's: rollouts, PPO and DPO compare probabilities with those of the same model, and run in eval mode.

Left out: DoRA, rank-stabilised scaling, ranks that differ between layers, adapters of embeddings and of the LM head.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf.device.precision import full_precision
from minirlhf.io.training_state import module_hash
from minirlhf.models.layers import Conv1D, Widened, features
from minirlhf.models.lora_config import LoRAConfig

if TYPE_CHECKING:
    from minirlhf.models.decoder import Decoder


class LoRALayer(nn.Module):
    """A Conv1D or nn.Linear whose parameters it takes over, with an adapter, or held in fewer bits than its input."""

    def __init__(self, layer: Conv1D | nn.Linear):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.plain, self.transposed = type(layer).forward, getattr(layer, "transposed", False)
        self.lora_A: nn.Parameter | None = None  # (rank, in)
        self.lora_B: nn.Parameter | None = None  # (out, rank); None: no adapter
        self.scale, self.dropout = 1.0, nn.Dropout(0.0)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
            y: Tensor = self.plain(self, x)  # type: ignore[arg-type]
        else:
            y = Widened.apply(x, self.weight.T if self.transposed else self.weight, self.bias)
        if self.lora_A is None or self.lora_B is None:
            return y
        return y + F.linear(F.linear(self.dropout(x), self.lora_A) * self.scale, self.lora_B)


def add_lora(decoder: Decoder, config: LoRAConfig | None, seed: int = 0) -> LoRAConfig | None:
    """Give a decoder adapters and freeze the rest, in place; a trainer calls it before it makes its optimizer.

    config: None: the adapters that the decoder has are trained, or, if it has none, the decoder itself.
    seed: of the generator that draws A, uniform in +-1 / sqrt(in), as in peft.
    Returns the settings with the names of the targets, or None. Raises ValueError for targets that name no layer, or
    adapters of another rank, alpha or other targets than the decoder has.
    """
    if config is not None and decoder.lora is None:
        attach(decoder, config, seed)
    elif config is not None and decoder.lora is not None:
        for name in ("rank", "alpha", "targets"):
            old, new = getattr(decoder.lora, name), getattr(config, name)
            if new not in (None, old):
                advice = "leave lora out to go on with them, or load the base without them"
                raise ValueError(f"LoRAConfig.{name} is {new!r}, but the model has adapters of {old!r}: {advice}")
        decoder.lora = dataclasses.replace(config, targets=decoder.lora.targets)
    if decoder.lora is None:
        decoder.source, decoder.base_hash = None, ""  # what is trained is not what was loaded
        return None
    for name, layer in matrices(decoder).items():
        if decoder.lora.base_dtype == "bf16":
            layer = _adaptable(decoder, name)
            layer.weight.data = layer.weight.data.to(torch.bfloat16)
        if isinstance(layer, LoRALayer):
            layer.dropout.p = decoder.lora.dropout
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(name.endswith((".lora_A", ".lora_B")))
    return decoder.lora


def attach(decoder: Decoder, config: LoRAConfig, seed: int = 0) -> None:
    """The adapters of `add_lora`; raises as it does, before the decoder is changed."""
    targets = config.targets or tuple(dict.fromkeys(name.rpartition(".")[2] for name in matrices(decoder)))
    chosen, generator = targeted(decoder, targets), torch.Generator().manual_seed(seed)
    decoder.base_hash = decoder.base_hash or module_hash(decoder)
    for name, plain in chosen.items():
        (n_in, n_out), layer = features(plain), _adaptable(decoder, name)
        A = torch.empty(config.rank, n_in).uniform_(-1, 1, generator=generator) / math.sqrt(n_in)
        like = full_precision(layer.weight[:0])
        layer.lora_A, layer.lora_B = nn.Parameter(A.to(like)), nn.Parameter(like.new_zeros(n_out, config.rank))
        layer.scale = config.alpha / config.rank
    decoder.lora = dataclasses.replace(config, targets=targets)


def matrices(decoder: Decoder) -> dict[str, Any]:
    """The layers of a decoder's blocks that multiply by a matrix, by name."""
    inside = {id(module) for module in decoder.blocks.modules()}
    kinds = (Conv1D, nn.Linear, LoRALayer)
    return {name: m for name, m in decoder.named_modules() if isinstance(m, kinds) and id(m) in inside}


def targeted(decoder: Decoder, targets: Sequence[str]) -> dict[str, Any]:
    """Of `matrices` those whose names are a target or end in one, as in peft. Raises ValueError for one of none."""
    layers = matrices(decoder)
    found = {target: [n for n in layers if f".{n}".endswith(f".{target}")] for target in targets}
    for target in [target for target, names in found.items() if not names]:
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers))
        raise ValueError(f"LoRAConfig.targets has {target!r}, which is no layer of the model's blocks: {known}")
    return {name: layer for name, layer in layers.items() if any(name in names for names in found.values())}


def _adaptable(decoder: Decoder, name: str) -> LoRALayer:
    """The LoRALayer of this name, put in the place of the layer that was there."""
    layer: Any = decoder.get_submodule(name)
    if not isinstance(layer, LoRALayer):
        parent, _, leaf = name.rpartition(".")
        layer = LoRALayer(layer)
        setattr(decoder.get_submodule(parent), leaf, layer)
    return layer


def adapters_off(decoder: Decoder) -> Decoder:
    """The same model without its adapters; it shares all other tensors, so it takes no memory of its own."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
    base = copy.deepcopy(decoder, shared)
    for layer in base.modules():
        if isinstance(layer, LoRALayer):
            layer.lora_A = layer.lora_B = None
    base.lora = None
    return base


@torch.no_grad()
def merged(decoder: Decoder) -> Decoder:
    """The model without adapters that computes the same: W + alpha / rank B A in fp32; one without, as it is."""
    if decoder.lora is None:
        return decoder
    whole = adapters_off(decoder)
    for name, layer in matrices(decoder).items():
        if isinstance(layer, LoRALayer) and layer.lora_A is not None and layer.lora_B is not None:
            change = layer.lora_B @ layer.lora_A * layer.scale
            weight = layer.weight + (change.T if layer.transposed else change)
            setattr(whole.get_submodule(name), "weight", nn.Parameter(weight, requires_grad=False))  # noqa: B010
    return whole
