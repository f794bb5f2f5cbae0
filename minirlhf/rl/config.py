"""Settings of PPO, and the presets of published implementations.

Apart from the trainer for its length alone: each field is read in `trainer.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from minirlhf.common.suggestions import suggest
from minirlhf.common.validation import (
    require,
    require_above,
    require_bools,
    require_counts,
    require_finite,
    require_non_negative,
    require_one_of,
    require_positive,
    require_positive_ints,
    require_unit_interval,
)
from minirlhf.device.precision import PRECISION_SETTINGS
from minirlhf.device.schedules import SCHEDULES
from minirlhf.generation.sampling import SamplingConfig
from minirlhf.models.heads import VALUE_HEAD_KINDS
from minirlhf.rl import ppo
from minirlhf.rl.field_names import FIELD_NAMES


@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO; names and defaults of the first block are those of the original recipe.

    Raises ValueError with the field, the value and what is allowed.
    """

    # The loop
    steps: int = 25000  # episodes (sequences) of the whole run: steps / batch_size iterations
    batch_size: int = 128  # sequences an iteration
    forward_batch_size: int = 16  # sequences a forward pass: micro-batches; memory and speed, not results
    gen_len: int = 16  # new tokens a prompt
    save_freq: int = 5  # iterations between printed samples and saves
    # The algorithm
    ppo_epochs: int = 4  # passes over each batch
    lr: float = 2e-6
    init_kl_coef: float = 0.2  # first weight of the KL penalty in the reward
    target: float = 6.0  # KL per sequence (sum over its tokens) that the controller aims at, nats
    horizon: float = 10000.0  # episodes; the time scale of the controller
    gamma: float = 1.0  # discount
    lam: float = 0.95  # of GAE
    cliprange: float = 0.2  # of the ratio
    cliprange_value: float = 0.2
    vf_coef: float = 0.1  # weight of the value loss

    # What a modern trainer needs besides
    adaptive_kl: bool = True  # False: init_kl_coef stays
    minibatch_size: int = 16  # sequences an optimizer step; 1 in the original recipe
    max_grad_norm: float | None = 1.0  # None: no clipping
    adam_eps: float = 1e-8
    lr_schedule: str = "constant"  # constant, linear or cosine, counted in optimizer steps over the whole run
    lr_warmup: float = 0.0  # share of all optimizer steps
    target_kl: float | None = None  # stop the epochs of a batch once approxkl passes this, nats a token
    entropy_coef: float = 0.0  # weight of an entropy bonus
    log_ratio_limit: float = ppo.LOG_RATIO_LIMIT  # log-ratios are clamped to +- this before exp
    dual_clip: float | None = None  # c > 1: bound the loss of tokens with negative advantage by -A c
    value_warmup: int = 0  # iterations at the start in which the value head alone is trained
    # KL
    kl_estimator: str = "k1"  # k1, k2, k3 or exact (over the whole sampling set)
    # reward: a penalty in the token rewards; loss: beta * KL added to the loss, where k1 has a gradient of mean 0
    kl_placement: str = "reward"
    kl_unit: str = "sequence"  # what the controller compares with its target: KL a sequence, or a token
    # Scores, in the order in which they are changed
    missing_eos: str = "keep"  # keep, replace or subtract, for responses that do not end in eos_token_id
    missing_eos_score: float = 0.0
    overlong: str = "keep"  # keep, replace or subtract, for responses of more than max_response_tokens
    overlong_score: float = 0.0
    max_response_tokens: int | None = None
    score_scale: float = 1.0  # factor
    score_whitening: bool = False  # by the running mean and standard deviation of all scores so far
    score_clip: float | None = None  # to +- this
    # Where implementations differ; the table in examples/README.md says which has what
    whiten_scope: str = "batch"  # advantages are whitened over the batch, the minibatch or each sequence
    whiten_ddof: int = 1  # 1: unbiased variance, 0: biased
    whiten_rewards: bool = False  # scale token rewards to variance 1 as well, in the same scope
    loss_averaging: str = "tokens"  # of a minibatch; micro_batches: mean of micro-batch means; sequences: of row means
    score_position: str = "last_token"  # last_column: the score is lost for responses shorter than the longest
    score_temperature: bool = True  # False: logits are not divided by the temperature when scoring
    value_head: str | None = None  # linear or tanh, made for a policy that is a plain GPT2; None: linear
    value_head_init: float = 0.0  # weights of that head start uniform in +- this
    # Sampling
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.95
    score_full_softmax: bool = False  # True: score truncated samples with the full softmax, as the original recipe
    eos_token_id: int | None = None  # None: every response has gen_len tokens
    # fp32, tf32 (on a GPU), bf16 or fp16, over fp32 weights; auto: as `precision_choice` finds
    precision: str = "auto"
    checkpoint_activations: bool = False  # compute activations again in the backward pass: less memory, a third slower
    compile: bool = False  # torch.compile of the blocks of policy and reference, which needs a C++ compiler or a GPU
    cuda_graphs: bool = True  # on a GPU, decode by replaying a CUDA graph
    device: str = "auto"
    seed: int = 0
    # shared: the reference uses the policy's own frozen lower layers instead of copies of them; own: it does not
    reference: str = "own"
    # When things go wrong
    reward_timeout: float | None = None  # seconds that the reward function may take for a batch; None: any time
    # Optimizer steps in a row whose loss or gradient is not finite: each is skipped, so many end the run after their
    # batch. More than the 16 halvings of fp16's first loss scale of 2**16.
    max_bad_steps: int = 20

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "forward_batch_size", "gen_len", "save_freq", "ppo_epochs", "minibatch_size")
        require_positive_ints(self, *counts, "max_bad_steps")
        require_above(self, 0, "lr", "target", "horizon", "cliprange", "cliprange_value", "adam_eps")
        require_positive(self, "log_ratio_limit")
        require_non_negative(self, "init_kl_coef", "vf_coef", "entropy_coef", "value_head_init")
        require_unit_interval(self, "gamma", "lam", "lr_warmup")
        require_finite(self, "missing_eos_score", "overlong_score", "score_scale")
        require_counts(self, "value_warmup", "seed")
        require_bools(self, "adaptive_kl", "score_whitening", "whiten_rewards")
        require_bools(self, "score_temperature", "score_full_softmax")
        require_bools(self, "checkpoint_activations", "compile", "cuda_graphs")
        require(self, "seed", self.seed < 2**63 - 1, "below 2**63 - 1")
        for name, bound in (("target_kl", 0), ("score_clip", 0), ("dual_clip", 1), ("reward_timeout", 0)):
            if getattr(self, name) is not None:
                require_above(self, bound, name)
        if self.max_grad_norm is not None:
            require_positive(self, "max_grad_norm")
        if self.eos_token_id is not None:
            require_counts(self, "eos_token_id")
        require_one_of(self, "kl_estimator", (*ppo.KL_ESTIMATORS, "exact"))
        require_one_of(self, "kl_placement", ("reward", "loss"))
        require_one_of(self, "kl_unit", ("sequence", "token"))
        require_one_of(self, "missing_eos", ppo.PENALTY_MODES)
        fine = self.missing_eos == "keep" or self.eos_token_id is not None
        require(self, "missing_eos", fine, "keep unless eos_token_id is set")
        require_one_of(self, "overlong", ppo.PENALTY_MODES)
        if self.overlong != "keep":
            require_positive_ints(self, "max_response_tokens")
        require_one_of(self, "whiten_scope", ("batch", "minibatch", "sequence"))
        require(self, "whiten_ddof", type(self.whiten_ddof) is int and self.whiten_ddof in (0, 1), "0 or 1")
        require_one_of(self, "loss_averaging", ("tokens", "micro_batches", "sequences"))
        require_one_of(self, "score_position", ("last_token", "last_column"))
        if self.value_head is not None:
            require_one_of(self, "value_head", VALUE_HEAD_KINDS)
        require_one_of(self, "lr_schedule", SCHEDULES)
        require_one_of(self, "precision", PRECISION_SETTINGS)
        require_one_of(self, "reference", ("own", "shared"))
        _ = self.sampling  # temperature, top_k and top_p are checked there

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(self.temperature, self.top_k, self.top_p)

    @property
    def iterations(self) -> int:
        """Batches of the whole run."""
        return -(-self.steps // self.batch_size)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> PPOConfig:
        """The settings of a published implementation: "original", "oai2019", "trl2020" or "trl0.11".

        Raises ValueError for another name, and as `with_overrides`.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls.with_overrides(**{**PRESETS[name], **overrides})

    @classmethod
    def with_overrides(cls, base: PPOConfig | None = None, **overrides: Any) -> PPOConfig:
        """`base`, or the defaults, with some fields replaced.

        Raises ValueError for an unknown name, with the field that is meant (see `field_names`).
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in overrides:
            if name not in known:
                raise ValueError(f"PPOConfig has no field {name!r}; {suggest(name, known, FIELD_NAMES)}")
        return dataclasses.replace(base or cls(), **overrides)


# What each implementation does in the places where they differ; the rest is the default.
PRESETS: dict[str, dict[str, Any]] = {
    # The chapter: one optimizer step a sample, advantages whitened within it, top-p samples scored in full.
    "original": dict(
        minibatch_size=1,
        max_grad_norm=None,
        whiten_scope="sequence",
        score_position="last_column",
        score_full_softmax=True,
        value_head="tanh",
        value_head_init=0.036,  # 1 / sqrt(768), PyTorch's default for Linear(768, 1)
    ),
    # openai/lm-human-preferences, train_policy.py
    "oai2019": dict(
        lr=5e-6,
        lr_schedule="linear",
        batch_size=64,
        minibatch_size=64,
        adam_eps=1e-5,
        max_grad_norm=None,
        whiten_scope="minibatch",
        whiten_ddof=0,
        whiten_rewards=True,
        score_position="last_column",
        temperature=0.7,
        top_p=1.0,
        value_head="linear",
    ),
    # lvwerra/trl, the first release: ppo.py
    "trl2020": dict(
        lr=1.41e-5,
        batch_size=256,
        minibatch_size=1,
        max_grad_norm=None,
        whiten_scope="sequence",
        score_position="last_column",
        score_temperature=False,
        score_full_softmax=True,
        top_p=1.0,
        value_head="linear",
        value_head_init=0.036,
    ),
    # huggingface/trl 0.11, the last with PPOTrainer.step
    "trl0.11": dict(
        lr=1.41e-5,
        minibatch_size=128,
        max_grad_norm=None,
        loss_averaging="micro_batches",
        score_temperature=False,
        score_full_softmax=True,
        top_p=1.0,
        value_head="linear",
        value_head_init=0.036,
    ),
}
