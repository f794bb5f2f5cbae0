"""The fields of PPOConfig by name, for editors and type checkers, and the presets of published implementations.

docs/presets.md has the table of the presets. A test keeps `PPOOverrides` equal to the dataclass.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from minirlhf.models.lora_config import LoRAConfig


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
    whiten_advantages: bool
    whiten_scope: Literal["batch", "minibatch", "sequence"]
    whiten_ddof: int
    whiten_rewards: bool
    loss_averaging: Literal["tokens", "micro_batches", "sequences"]
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
    eos_token_id: int | None
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
    reference: Literal["own", "shared", "adapters off"] | None
    seed: int
    reward_timeout: float | None
    max_bad_steps: int


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
}
