"""Settings of PPO. The presets of published implementations are in `presets`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from minirlhf.common import validation
from minirlhf.common.field_names import FIELD_NAMES
from minirlhf.common.suggestions import require_fields
from minirlhf.device.precision import PRECISION_SETTINGS
from minirlhf.generation.sampling import SamplingConfig
from minirlhf.models.lora_config import LoRAConfig
from minirlhf.rl.advantages import ADVANTAGES
from minirlhf.rl.presets import PRESETS, PPOOverrides, require_combinations, require_method

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO; names and defaults of the first two groups are those of the original recipe.

    Raises ValueError with the field, the value and what is allowed.
    """

    # The loop
    steps: int = 25000  # episodes (sequences) of the whole run: steps / batch_size iterations
    batch_size: int = 128  # sequences an iteration
    forward_batch_size: int = 16  # sequences a forward pass of the update: memory and speed, but see loss_averaging
    gen_len: int = 16  # new tokens a prompt
    save_freq: int = 5  # iterations between printed samples and saves
    # The algorithm
    ppo_epochs: int = 4  # passes over each batch
    lr: float = 2e-6  # of AdamW
    init_kl_coef: float = 0.2  # first coefficient of the KL penalty
    target: float = 6.0  # KL per sequence (sum over its tokens) that the controller aims at, nats
    horizon: float = 10000.0  # episodes; the time scale of the controller
    gamma: float = 1.0  # discount
    lam: float = 0.95  # of GAE
    cliprange: float = 0.2  # of the ratio
    cliprange_value: float = 0.2
    vf_coef: float = 0.1  # weight of the value loss

    # Optimisation
    minibatch_size: int = 16  # sequences an optimizer step; 1 in the original recipe
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # over the optimizer steps of the whole run
    max_grad_norm: float | None = 1.0  # None: no clipping
    adam_eps: float = 1e-8
    target_kl: float | None = None  # stop the epochs of a batch once approxkl passes this, nats a token
    entropy_coef: float = 0.0  # weight of an entropy bonus
    # Advantages
    advantages: str = "gae"  # a name in `advantages.ADVANTAGES`
    group_size: int = 1  # responses a prompt, side by side in the batch
    drop_flat_groups: int = 0  # rounds in which groups without spread are sampled anew, see `rl/groups.py`
    cliprange_high: float | None = None  # of ratios above 1; None: as below
    policy_ratio: Literal["token", "sequence"] = "token"  # what is clipped, see `losses.log_ratio`
    whiten_advantages: bool = True
    whiten_scope: Literal["batch", "minibatch", "sequence"] = "batch"
    whiten_ddof: int = 1  # 1: unbiased variance, 0: biased
    whiten_rewards: bool = False  # scale token rewards to variance 1 as well, in the same scope
    loss_averaging: Literal["tokens", "micro_batches", "sequences", "gen_len"] = "tokens"  # `losses.token_weights`
    # The leash
    adaptive_kl: bool = True  # False: init_kl_coef stays
    kl_estimator: Literal["k1", "k2", "k3", "exact"] = "k1"  # exact: over the whole sampling set, with its gradient
    kl_placement: Literal["reward", "loss"] = "reward"  # presets.KL_PLACEMENTS has the pairs
    # Scores, in the order in which they are changed
    missing_eos: Literal["keep", "replace", "subtract"] = "keep"  # for responses that do not end in eos_token_id
    missing_eos_score: float = 0.0
    score_scale: float = 1.0  # factor
    score_clip: float | None = None  # to +- this
    score_position: Literal["last_token", "last_column"] = "last_token"  # see `shaping.token_rewards`
    # Sampling
    temperature: float = 1.0  # divides the logits
    top_k: int = 0  # most probable tokens; 0: all
    top_p: float = 0.95  # nucleus; 1: all, which is SamplingConfig's own default
    eos_token_id: int | tuple[int, ...] | None = None  # one or several; None: every response has gen_len tokens
    # What was sampled is what log-probabilities refer to, unless turned off:
    logprobs_temperature: bool = True  # False: logits are not divided by the temperature
    logprobs_full_softmax: bool = False  # True: the full softmax for truncated samples, as in the original recipe
    # The value head, made for a policy that is a plain decoder
    value_head: Literal["linear", "tanh"] | None = None  # None: linear
    value_head_init: float = 0.0  # weights of that head start uniform in +- this
    lora: LoRAConfig | None = None  # adapters that are trained in the place of the policy's weights
    # The machine
    device: str = "auto"  # auto, cpu or cuda[:index]
    precision: str = "auto"  # fp32, tf32 (on a GPU), bf16 or fp16, over fp32 weights; auto: see `precision_choice`
    checkpoint_activations: bool = False  # compute activations again in the backward pass: less memory, a third slower
    compile: bool = False  # torch.compile of the blocks of policy and reference, which needs a C++ compiler or a GPU
    cuda_graphs: bool = False  # on a GPU, decode by replaying a CUDA graph
    sharding: Literal["full"] | None = None  # full: each of several processes holds a part of the models
    # shared: it uses the memory of the policy's frozen layers; None: own, or with LoRA the policy with adapters off
    reference: Literal["own", "shared", "adapters off"] | None = None
    seed: int = 0  # of all random numbers
    reward_timeout: float | None = None  # seconds that the reward function may take for a batch; None: any time
    reward_workers: int = 0  # threads that score parts of a batch while the next is sampled, see `rewards/overlap.py`
    # Optimizer steps in a row that may be skipped because their loss or gradient is not finite. More than the 16
    # halvings of fp16's first loss scale of 2**16.
    max_bad_steps: int = 20

    def __new__(cls, *_: Any, **fields: Any) -> Self:
        """Names a field that does not exist, with the one that is meant, before Python's own error on arguments."""
        require_fields(cls, fields, FIELD_NAMES)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        validation.plain_numbers(self)
        object.__setattr__(self, "lora", LoRAConfig.of(self.lora))
        counts = ("steps", "batch_size", "forward_batch_size", "gen_len", "save_freq", "ppo_epochs", "minibatch_size")
        validation.require_positive_ints(self, *counts, "group_size", "max_bad_steps")
        validation.require_above(self, 0, "lr", "target", "horizon", "cliprange", "cliprange_value", "adam_eps")
        validation.require_non_negative(self, "init_kl_coef", "vf_coef", "entropy_coef", "value_head_init")
        validation.require_unit_interval(self, "gamma", "lam")
        validation.require_finite(self, "missing_eos_score", "score_scale")
        validation.require_counts(self, "seed", "drop_flat_groups", "reward_workers")
        validation.require(self, "seed", self.seed < 2**63 - 1, "below 2**63 - 1")
        for name in ("target_kl", "score_clip", "reward_timeout", "cliprange_high"):
            if getattr(self, name) is not None:
                validation.require_above(self, 0, name)
        if self.max_grad_norm is not None:
            validation.require_positive(self, "max_grad_norm")
        validation.require_token_ids(self, "eos_token_id")
        validation.require(self, "whiten_ddof", type(self.whiten_ddof) is int and self.whiten_ddof in (0, 1), "0 or 1")
        validation.require_one_of(self, "precision", PRECISION_SETTINGS)
        validation.require_one_of(self, "advantages", ADVANTAGES)
        for name, kind in get_type_hints(PPOConfig).items():
            if kind is bool:
                validation.require_bools(self, name)
            for choices in [part for part in (kind, *get_args(kind)) if get_origin(part) is Literal]:
                if choices is kind or getattr(self, name) is not None:
                    validation.require_one_of(self, name, get_args(choices))
        fine = self.missing_eos == "keep" or self.eos_token_id is not None
        validation.require(self, "missing_eos", fine, "keep unless eos_token_id is set")
        require_combinations(self)
        _ = self.sampling  # temperature, top_k and top_p are checked there

    @property
    def sampling(self) -> SamplingConfig:
        """How tokens are drawn."""
        return SamplingConfig(self.temperature, self.top_k, self.top_p)

    @property
    def adapters_off(self) -> bool:
        """Whether the reference is the policy without its adapters."""
        return self.reference == "adapters off" or (self.reference is None and self.lora is not None)

    @property
    def iterations(self) -> int:
        """Batches of the whole run."""
        return -(-self.steps // self.batch_size)

    @property
    def logprobs_divisor(self) -> float:
        """What logits are divided by for log-probabilities: the sampling temperature, unless turned off."""
        return self.temperature if self.logprobs_temperature else 1.0

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss has a KL term. The exact KL has one besides its place in the reward: its own gradient."""
        return self.kl_placement == "loss" or self.kl_estimator == "exact"

    @classmethod
    def preset(cls, name: str, **overrides: Unpack[PPOOverrides]) -> PPOConfig:
        """The settings of a published implementation, by its name in `presets.PRESETS`, with some fields replaced.

        Raises ValueError for another name, for an override that would make it another method, and as `with_overrides`.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        config = cls.with_overrides(cls(**PRESETS[name]), **overrides)
        require_method(config, name, cls(**PRESETS[name]))
        return config

    @classmethod
    def with_overrides(cls, base: PPOConfig | None = None, **overrides: Unpack[PPOOverrides]) -> PPOConfig:
        """`base`, or the defaults, with some fields replaced.

        Raises ValueError for an unknown name, with the field that is meant (see `field_names`).
        """
        require_fields(cls, overrides, FIELD_NAMES)
        return dataclasses.replace(validation.require_config(base, cls), **overrides)
