"""Settings of DPO, their types for editors and type checkers, and what TRL and others call them."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypedDict

from minirlhf.common.suggestions import require_fields
from minirlhf.common.validation import (
    require,
    require_above,
    require_bools,
    require_one_of,
    require_positive_ints,
    require_unit_interval,
)
from minirlhf.device.precision import PRECISION_SETTINGS
from minirlhf.models.lora_config import LoRAConfig
from minirlhf.supervised.loop import FitConfig

if TYPE_CHECKING:
    from typing_extensions import Unpack

LOSSES = ("sigmoid", "ipo")


@dataclass(frozen=True)
class DPOConfig(FitConfig):
    """Settings of DPO. Raises ValueError with the field, the value and what is allowed.

    The loss of an optimizer step is the mean over its `batch_size` pairs, however they are cut into forward passes.
    A pair is never divided, even if it exceeds `tokens_per_batch`.
    """

    PRECISIONS: ClassVar[tuple[str, ...]] = PRECISION_SETTINGS

    # Of these, the batch size, the learning rate, its schedule and beta are those of Rafailov et al. 2023, appendix B.
    epochs: int = 1
    batch_size: int = 64  # pairs an optimizer step
    max_length: int = 1024  # tokens of a prompt with a response and its end; a longer pair is refused
    lr: float = 1e-6
    schedule: str = "constant"
    warmup: float = 0.1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    precision: str = "auto"  # fp32, tf32 (on a GPU), bf16 or fp16, over fp32 weights; auto: see `precision_choice`
    beta: float = 0.1  # weight of the KL to the reference; tau of IPO
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # `dpo.dpo_loss` or `dpo.ipo_loss`
    label_smoothing: float = 0.0  # of "sigmoid": the probability that a label is wrong
    reference_free: bool = False  # the reference is uniform: every response has the same log-probability
    packing: bool = False  # several pairs a row; no response attends to another
    lora: LoRAConfig | None = None  # adapters that are trained; the reference is the policy without them
    reference_cache: str | None = None  # folder of the reference's log-probabilities, by hash; None: in memory only

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_ints(self, "batch_size")
        require_above(self, 0, "beta")
        require_one_of(self, "loss", LOSSES)
        require_unit_interval(self, "label_smoothing")
        require(self, "label_smoothing", self.label_smoothing < 0.5, "below 0.5, where labels say nothing")
        fine = self.loss == "sigmoid" or self.label_smoothing == 0
        require(self, "label_smoothing", fine, f"0 with loss={self.loss!r}: it is defined for 'sigmoid'")
        require_bools(self, "reference_free", "packing")
        object.__setattr__(self, "lora", LoRAConfig.of(self.lora))
        fine = self.reference_cache is None or isinstance(self.reference_cache, (str, os.PathLike))
        require(self, "reference_cache", fine, "a folder or None")
        if self.reference_cache is not None:
            object.__setattr__(self, "reference_cache", os.fspath(self.reference_cache))

    @property
    def adapters_off(self) -> bool:
        """Whether the reference is the policy without its adapters."""
        return self.lora is not None and not self.reference_free

    @classmethod
    def with_overrides(cls, base: DPOConfig | None = None, **overrides: Unpack[DPOOverrides]) -> DPOConfig:
        """`base`, or the defaults, with some fields replaced.

        Raises ValueError for an unknown name, with the field that is meant.
        """
        require_fields(cls, overrides, FIELD_NAMES)
        return dataclasses.replace(base or cls(), **overrides)


class DPOOverrides(TypedDict, total=False):
    """Fields of DPOConfig, which documents them. A test keeps them equal to the dataclass."""

    epochs: int
    max_length: int
    tokens_per_batch: int
    lr: float
    schedule: str
    warmup: float
    lr_floor: float
    weight_decay: float
    betas: tuple[float, float]
    max_grad_norm: float
    precision: str
    device: str
    sharding: Literal["full"] | None
    seed: int
    save_freq: int
    batch_size: int
    beta: float
    loss: Literal["sigmoid", "ipo"]
    label_smoothing: float
    reference_free: bool
    packing: bool
    lora: LoRAConfig | None
    reference_cache: str | None


# Field of DPOConfig or None, a remark where the unit or the meaning differs: its names elsewhere.
_NAMES: dict[tuple[str | None, str], str] = {
    ("lr", ""): "learning_rate",
    ("epochs", ""): "num_train_epochs max_epochs",
    ("batch_size", "in pairs an optimizer step"): "per_device_train_batch_size train_batch_size minibatch_size",
    ("tokens_per_batch", "tokens of a forward pass; a step has batch_size pairs"):
        "gradient_accumulation_steps micro_batch_size micro_train_batch_size forward_batch_size",
    ("max_length", "of prompt and response together; a longer pair is refused"):
        "max_prompt_length max_completion_length max_len max_target_length",
    ("schedule", ""): "lr_scheduler_type lr_scheduler lr_schedule",
    ("warmup", "as a share of all steps"): "warmup_ratio warmup_steps lr_warmup_ratio",
    ("betas", "both in a tuple"): "adam_beta1 adam_beta2 adam_betas",
    ("max_grad_norm", "inf for no clipping"): "max_norm grad_clip clip_grad gradient_clipping",
    ("beta", ""): "tau kl_coef",
    ("loss", '"sigmoid" or "ipo"'): "loss_type ipo",
    ("precision", '"bf16", "fp16" or another'): "bf16 fp16 dtype torch_dtype mixed_precision",
    ("lora", "a LoRAConfig"): "peft_config lora_config lora_r lora_rank lora_alpha lora_dropout lora_target_modules",
    ("packing", ""): "padding_free packing_samples",
    ("save_freq", "in optimizer steps"): "save_steps save_interval",
    ("device", '"cpu"'): "use_cpu",
    ("seed", ""): "random_seed data_seed",
    (None, "the reference's log-probabilities are always computed once, before the first step"):
        "precompute_ref_log_probs precompute_ref_batch_size",
    (None, "dropout is off in policy and reference"): "disable_dropout",
    (None, "models are handed to DPOTrainer"): "model_name model_name_or_path ref_model",
    (None, "pairs are handed to DPOTrainer.train"): "train_dataset dataset_num_proc",
    (None, "a Run, or on_step of DPOTrainer.train, logs"): "log_with report_to logging_steps",
    (None, "the folder is an argument of Run.start"): "output_dir",
}  # fmt: skip
FIELD_NAMES = {name: meant for meant, names in _NAMES.items() for name in names.split()}
