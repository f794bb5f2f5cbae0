"""Rotary position embeddings (Su et al. 2021), and the ways in which published models stretch them to longer texts.

A pair of features (x_i, x_{i + hs/2}) of a head is turned by the angle p w_i at position p, w_i = theta^(-2i / hs). A
`rope_type` changes these frequencies:

    linear   w_i / factor (Chen et al. 2023, "Position Interpolation")
    dynamic  as default up to the model's `max_position_embeddings`, and no sequence is longer here. (Beyond, earlier
             tokens would turn anew with each new one, so that no token had a log-probability of its own.)
    llama3   w_i / factor where the wavelength 2 pi / w_i is long, w_i where it is short, and a ramp between
             (https://github.com/meta-llama/llama-models, `apply_scaling`)
    yarn     a ramp from w_i to w_i / factor over the dimensions, and larger attention logits (Peng et al. 2023)

Left out: longrope, and heads of which only a part is turned.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minirlhf.common import validation

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
Rotary = tuple[Tensor, Tensor]  # cosines and sines, both (B or 1, 1, T, hs)


@dataclass(frozen=True)
class RopeConfig:
    """The `rope_parameters` of a published config.json. Raises ValueError for a bad field."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float | None = None  # how much longer texts become
    original_max_position_embeddings: int | None = None  # before the stretch; None: the model's positions
    low_freq_factor: float | None = None  # llama3: from this many turns in the original length on, the ramp
    high_freq_factor: float | None = None  # llama3: from this many turns on, nothing is stretched
    attention_factor: float | None = None  # yarn: of cosines and sines; None: from the next two, or from `factor`
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float | None = None  # yarn: turns at which the ramp begins; None: 32
    beta_slow: float | None = None  # yarn: turns at which it ends; None: 1
    truncate: bool = True  # yarn: whether the ramp's ends are whole dimensions

    def __post_init__(self) -> None:
        validation.require_one_of(self, "rope_type", ROPE_TYPES)
        validation.require_above(self, 1, "rope_theta")
        validation.require_bools(self, "truncate")
        needed = {"default": (), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
        for name in needed.get(self.rope_type, ("factor",)):
            validation.require(self, name, getattr(self, name) is not None, f"given for rope_type={self.rope_type!r}")
        optional = ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow")
        for name in (*optional, "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                validation.require_above(self, 0, name)
        if self.original_max_position_embeddings is not None:
            validation.require_positive_ints(self, "original_max_position_embeddings")
        if self.rope_type == "llama3":
            low, high = float(self.low_freq_factor or 0), float(self.high_freq_factor or 0)
            validation.require(self, "high_freq_factor", high > low, f"above low_freq_factor={low}")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RopeConfig:
        """Of a config.json: `rope_parameters`, or `rope_scaling` and `rope_theta` as before transformers 5.

        Other keys of these objects are ignored. Raises ValueError with the key for a value that is not supported.
        """
        # transformers prefers the old key if there are both.
        name = "rope_scaling" if content.get("rope_scaling") else "rope_parameters"
        found = content.get(name)
        found = {} if found is None else found
        if not isinstance(found, Mapping):
            raise ValueError(f"{name} must be an object, got {found!r:.80}")
        if nested := [key for key, value in found.items() if isinstance(value, Mapping)]:
            raise ValueError(f"{name}[{nested[0]!r:.40}] is not supported: all layers must have the same embeddings")
        kind = found.get("rope_type", found.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ValueError(
                f"{name} has rope_type={kind!r:.80}, supported are {', '.join(ROPE_TYPES)}: use a checkpoint with one "
                f"of these, or remove {name} from config.json if texts stay within the original length"
            )
        partial = found.get("partial_rotary_factor", content.get("partial_rotary_factor"))
        if partial not in (None, 1):
            raise ValueError(f"partial_rotary_factor={partial!r:.80} is not supported, only 1: whole heads are turned")
        fields = {field.name: found[field.name] for field in dataclasses.fields(cls) if field.name in found}
        theta = content.get("rope_theta")
        defaults = {} if theta is None else {"rope_theta": theta}
        top = content.get("original_max_position_embeddings")
        original = {} if top is None else {"original_max_position_embeddings": top}
        return cls(**{**defaults, **fields, **original, "rope_type": kind})

    def to_json(self) -> dict[str, Any]:
        """The fields that are set, as transformers writes them."""
        fields = dataclasses.asdict(self).items()
        return {name: value for name, value in fields if value is not None and (name, value) != ("truncate", True)}


def frequencies(rope: RopeConfig, head_dim: int, n_positions: int) -> tuple[Tensor, float]:
    """Frequencies w (hs / 2,) in radians a position, fp32 on the CPU, and the factor of cosines and sines."""
    # On the CPU also where a model is built without memory. The order of operations is that of transformers: angles at
    # late positions show the last bit of a frequency.
    periods = rope.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float, device="cpu") / head_dim)
    w, factor = 1.0 / periods, rope.factor or 1.0
    original = rope.original_max_position_embeddings or n_positions
    if rope.rope_type == "linear":
        return w / factor, 1.0
    if rope.rope_type == "llama3":
        low, high = float(rope.low_freq_factor or 1.0), float(rope.high_freq_factor or 1.0)
        turns = original / (2 * math.pi / w)  # of the original length
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * w / factor + kept * w, 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, periods, head_dim, factor, original)
    return w, 1.0


def _yarn(rope: RopeConfig, periods: Tensor, head_dim: int, factor: float, original: int) -> tuple[Tensor, float]:
    """Section 3.2 of the paper, with the ramp over dimensions as in https://github.com/jquesnelle/yarn."""

    def dimension(turns: float) -> float:
        """The dimension that turns so often in the original length."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    first, last = dimension(rope.beta_fast or 32), dimension(rope.beta_slow or 1)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    steps = torch.arange(head_dim // 2, dtype=torch.float, device="cpu")
    last += 0.001 if first == last else 0.0
    kept = 1 - ((steps - first) / (last - first)).clamp(0, 1)
    w = 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept
    if rope.attention_factor is not None:
        return w, rope.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return w, mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return w, mscale(1.0)


def rotary(positions: Tensor, w: Tensor, factor: float) -> Rotary:
    """Cosines and sines, fp32, of the angles at positions (T,) or (B, T)."""
    angles = (positions if positions.ndim == 2 else positions[None]).unsqueeze(-1).float() * w  # (B or 1, T, hs / 2)
    angles = torch.cat([angles, angles], -1).unsqueeze(1)  # the same for all heads
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, angles: Rotary) -> Tensor:
    """Turn queries or keys (B, nh, T, hs)."""
    (cos, sin), (first, second) = angles, x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
