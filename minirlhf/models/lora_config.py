"""Settings of LoRA, as the configs of the trainers hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from minirlhf.common import validation
from minirlhf.common.suggestions import require_fields

PEFT_NAMES = {"r": ("rank", ""), "lora_alpha": ("alpha", ""), "lora_dropout": ("dropout", ""),
              "target_modules": ("targets", "")}  # fmt: skip


@dataclass(frozen=True)
class LoRAConfig:
    """Settings of LoRA. Raises ValueError with the field, the value and what is allowed."""

    rank: int = 8
    alpha: float = 16.0  # an adapter's output is multiplied by alpha / rank
    dropout: float = 0.0  # on an adapter's input, in training mode
    # Names of layers, or ends of names: ("c_attn", "mlp.c_proj"). None: every matrix of the blocks, in GPT-2 c_attn,
    # c_proj and c_fc, in Llama q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj. Attention alone, as
    # peft has it by default, stays behind full training (Dettmers et al. 2023, "QLoRA", figure 2).
    targets: tuple[str, ...] | None = None
    base_dtype: Literal["fp32", "bf16"] = "fp32"  # of the blocks' frozen matrices; adapters are fp32

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):  # JSON has no tuples
            object.__setattr__(self, "targets", tuple(self.targets))
        validation.require_positive_ints(self, "rank")
        validation.require_above(self, 0, "alpha")
        validation.require_rates(self, "dropout")
        validation.require_one_of(self, "base_dtype", ("fp32", "bf16"))
        names = isinstance(self.targets, tuple) and all(isinstance(name, str) and name for name in self.targets)
        validation.require(self, "targets", self.targets is None or (names and self.targets != ()),
                           "None, or a tuple of names of layers")  # fmt: skip

    @classmethod
    def of(cls, value: LoRAConfig | Mapping[str, Any] | None) -> LoRAConfig | None:
        """A LoRAConfig, or None, as it is, or made of fields by name. Raises ValueError for an unknown name."""
        if value is None or isinstance(value, LoRAConfig):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"lora must be a LoRAConfig, its fields by name, or None, got {value!r:.80}")
        require_fields(cls, value, PEFT_NAMES)
        return cls(**value)
