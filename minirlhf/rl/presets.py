"""Fields of PPOConfig by name, for editors and type checkers, presets of published work, and what fits together.

docs/presets.md has the table of the presets of PPO, docs/algorithms.md that of the other methods. A test keeps
`PPOOverrides` equal to the dataclass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

from minirlhf.common import validation
from minirlhf.models.lora_config import LoRAConfig
from minirlhf.models.sharded import require_shardable
from minirlhf.rl.advantages import COMPARES_GROUPS, COMPARES_WHOLE_RETURNS, USES_VALUES

if TYPE_CHECKING:
    from minirlhf.rl.config import PPOConfig

# A KL estimator and where it is placed. The others do not pull towards the reference; docs/kl.md derives it.
KL_PLACEMENTS = (("k1", "reward"), ("exact", "reward"), ("k2", "loss"), ("k3", "loss"))


class PPOOverrides(TypedDict, total=False):
    """Fields of PPOConfig, which documents them."""

    steps: int
    batch_size: int
    forward_batch_size: int
    gen_len: int
    save_freq: int
    ppo_epochs: int
    lr: float
    init_kl_coef: float
    target: float
    horizon: float
    gamma: float
    lam: float
    cliprange: float
    cliprange_value: float
    vf_coef: float
    minibatch_size: int
    lr_schedule: Literal["constant", "linear", "cosine"]
    max_grad_norm: float | None
    adam_eps: float
    target_kl: float | None
    entropy_coef: float
    advantages: str
    group_size: int
    drop_flat_groups: int
    cliprange_high: float | None
    policy_ratio: Literal["token", "sequence"]
    whiten_advantages: bool
    whiten_scope: Literal["batch", "minibatch", "sequence"]
    whiten_ddof: int
    whiten_rewards: bool
    loss_averaging: Literal["tokens", "micro_batches", "sequences", "gen_len"]
    adaptive_kl: bool
    kl_estimator: Literal["k1", "k2", "k3", "exact"]
    kl_placement: Literal["reward", "loss"]
    missing_eos: Literal["keep", "replace", "subtract"]
    missing_eos_score: float
    score_scale: float
    score_clip: float | None
    score_position: Literal["last_token", "last_column"]
    temperature: float
    top_k: int
    top_p: float
    eos_token_id: int | tuple[int, ...] | None
    logprobs_temperature: bool
    logprobs_full_softmax: bool
    value_head: Literal["linear", "tanh"] | None
    value_head_init: float
    lora: LoRAConfig | None
    device: str
    precision: str
    checkpoint_activations: bool
    compile: bool
    cuda_graphs: bool
    sharding: Literal["full"] | None
    reference: Literal["own", "shared", "adapters off"] | None
    seed: int
    reward_timeout: float | None
    reward_workers: int
    max_bad_steps: int


# For the starter weights, whose GPT-2 is 25 times smaller than the original one and takes larger steps.
STARTER: PPOOverrides = dict(lr=2e-4, minibatch_size=32, forward_batch_size=32)
# The default run on them: one pass over each batch and a step size that falls to 0, as steps that are too large at the
# end cost KL and buy no reward (docs/optimum.md has the figures).
STARTER_RUN: PPOOverrides = dict(
    minibatch_size=32, forward_batch_size=32, steps=10240, ppo_epochs=1, lr=1.2e-4, lr_schedule="linear"
)
DEFAULT_METHOD = "rloo_to_go"  # of that run
LEASH: PPOOverrides = dict(init_kl_coef=0.11, cliprange=0.3)
# Beside STARTER_RUN; other methods keep the KL and the clip range of their presets. GSPO's clip range in the paper is
# for responses of thousands of tokens, not of 16.
OF_METHODS: dict[str, PPOOverrides] = {
    "ppo": LEASH,
    DEFAULT_METHOD: LEASH,
    "gspo": dict(cliprange=0.03, cliprange_high=0.04),
}

# What each implementation does in the places where they differ; the rest is the default.
PRESETS: dict[str, PPOOverrides] = {
    # The chapter: one optimizer step a sample, advantages whitened within it, top-p samples scored in full.
    "original": dict(
        minibatch_size=1,
        max_grad_norm=None,
        whiten_scope="sequence",
        score_position="last_column",
        logprobs_full_softmax=True,
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
        logprobs_temperature=False,
        logprobs_full_softmax=True,
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
        logprobs_temperature=False,
        logprobs_full_softmax=True,
        top_p=1.0,
        value_head="linear",
        value_head_init=0.036,
    ),
    # The methods without a value head, with KL and clip range of their papers; docs/algorithms.md has the table. The
    # three papers after GRPO leave its KL out: their coefficient is 0.
    # Williams 1992: one optimizer step a batch, so that the ratio is 1 and no clip binds.
    "reinforce": dict(
        advantages="reinforce",
        whiten_advantages=False,
        loss_averaging="gen_len",
        ppo_epochs=1,
        minibatch_size=128,
        adaptive_kl=False,
    ),
    # Ahmadian et al. 2024, on policy as well
    "rloo": dict(
        advantages="rloo",
        group_size=4,
        whiten_advantages=False,
        loss_averaging="gen_len",  # the sum over a response, as in the gradient of its log-probability
        ppo_epochs=1,
        minibatch_size=128,
        adaptive_kl=False,
        init_kl_coef=0.05,
    ),
    # PPO with the other responses to a prompt in the place of the value head: the least KL for a reward here
    "rloo_to_go": dict(
        advantages="rloo_to_go",
        group_size=16,
    ),
    # Shao et al. 2024 (DeepSeekMath)
    "grpo": dict(
        lr=1e-6,
        advantages="grpo",
        group_size=8,
        whiten_advantages=False,
        loss_averaging="sequences",
        ppo_epochs=1,
        minibatch_size=128,
        kl_estimator="k3",
        kl_placement="loss",
        adaptive_kl=False,
        init_kl_coef=0.04,
    ),
    # Liu et al. 2025
    "dr_grpo": dict(
        lr=1e-6,
        advantages="dr_grpo",
        group_size=8,
        whiten_advantages=False,
        loss_averaging="gen_len",
        ppo_epochs=1,
        adaptive_kl=False,
        kl_estimator="k3",
        kl_placement="loss",
        init_kl_coef=0.0,
    ),
    # Yu et al. 2025, without the length penalty
    "dapo": dict(
        lr=1e-6,
        advantages="grpo",
        group_size=16,
        drop_flat_groups=10,
        cliprange_high=0.28,
        whiten_advantages=False,
        ppo_epochs=1,
        adaptive_kl=False,
        kl_estimator="k3",
        kl_placement="loss",
        init_kl_coef=0.0,
    ),
    # Zheng et al. 2025
    "gspo": dict(
        advantages="grpo",
        group_size=8,
        policy_ratio="sequence",
        cliprange=3e-4,
        cliprange_high=4e-4,
        whiten_advantages=False,
        loss_averaging="sequences",
        ppo_epochs=1,
        minibatch_size=32,
        adaptive_kl=False,
        kl_estimator="k3",
        kl_placement="loss",
        init_kl_coef=0.0,
    ),
    # Hu 2025, with one response a prompt
    "reinforce++": dict(
        lr=5e-7,
        advantages="reinforce++",
        ppo_epochs=1,
        adaptive_kl=False,
        init_kl_coef=0.01,
    ),
}
METHODS = ("reinforce", "rloo", "rloo_to_go", "grpo", "dr_grpo", "dapo", "gspo", "reinforce++")
# These make a method, and so do those of PARTS that its preset turns on.
DEFINING = ("advantages", "policy_ratio", "loss_averaging", "whiten_advantages", "whiten_scope", "kl_placement")
PARTS = ("drop_flat_groups", "cliprange_high")


def starter_run(algorithm: str) -> dict[str, Any]:
    """The settings of a run of "ppo" or of one of METHODS on the starter weights: its preset, and what suits them."""
    return {**PRESETS.get(algorithm, {}), **STARTER_RUN, **OF_METHODS.get(algorithm, {})}


def require_combinations(config: PPOConfig) -> None:
    """Raise ValueError for fields that are fine one by one and contradict each other."""
    c, require = config, validation.require
    fits = c.batch_size % c.group_size == 0 and c.minibatch_size % c.group_size == 0
    require(c, "group_size", fits, "a divisor of batch_size and minibatch_size: groups stay whole")
    compared = c.advantages in COMPARES_GROUPS or c.drop_flat_groups > 0
    reason = f"at least 2 for advantages={c.advantages!r} with drop_flat_groups={c.drop_flat_groups}"
    require(c, "group_size", c.group_size > 1 or not compared, reason)
    whitened = c.whiten_advantages or c.advantages != "reinforce++"
    require(c, "whiten_advantages", whitened, "True for 'reinforce++' (without whitening it is 'reinforce')")
    high = c.cliprange_high
    require(c, "cliprange_high", high is None or high >= c.cliprange, f"at least cliprange, {c.cliprange!r}, or None")
    whole = c.advantages in COMPARES_WHOLE_RETURNS
    require(c, "gamma", c.gamma == 1 or not whole, f"1 for {c.advantages!r}, which compares whole returns")
    uses_values = c.advantages in USES_VALUES
    for name, off in (("whiten_rewards", False), ("value_head", None)):
        reason = f"{off} for {c.advantages!r}, which has no values"
        require(c, name, uses_values or getattr(c, name) == off, reason)
    pair, allowed = (c.kl_estimator, c.kl_placement), [" in the ".join(pair) for pair in KL_PLACEMENTS]
    require(
        c, "kl_placement", pair in KL_PLACEMENTS,
        f"one that pulls the policy towards the reference with kl_estimator={c.kl_estimator!r} "
        f"({', '.join(allowed)}; docs/kl.md says why)",
    )  # fmt: skip
    require_shardable(c)
    if c.sharding is not None:
        sharded = "with sharding='full'"
        require(c, "reference", c.reference in (None, "own"), f"'own' {sharded}")
        require(c, "compile", not c.compile, f"False {sharded}")
        require(c, "cuda_graphs", not c.cuda_graphs, f"False {sharded}: each iteration samples from a new copy")


def require_method(config: PPOConfig, name: str, preset: PPOConfig) -> None:
    """Raise ValueError if a config made from a method's preset is another method: its name would be wrong."""
    for field in DEFINING if name in METHODS else ():
        own = getattr(preset, field)
        validation.require(config, field, getattr(config, field) == own, f"{own!r} in preset {name!r}")
    for field in PARTS if name in METHODS else ():
        kept = bool(getattr(config, field)) or not getattr(preset, field)
        validation.require(config, field, kept, f"turned on, as in preset {name!r}")
