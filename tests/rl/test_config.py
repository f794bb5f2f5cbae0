"""Settings of PPO: what is refused, overrides, presets."""

import dataclasses
import math
import re
from typing import get_type_hints

import numpy as np
import pytest
from small_trainer import DEFAULTS, NAN, PROMPTS, SMALL, make_trainer, reward

from conftest import VOCAB, make_gpt2
from minirlhf import ActorCritic, PPOConfig, PPOTrainer, Tokenizer
from minirlhf.models.lora_config import LoRAConfig
from minirlhf.rl.kl import KL_ESTIMATORS
from minirlhf.rl.presets import DEFAULT_METHOD, KL_PLACEMENTS, METHODS, PRESETS, PPOOverrides, starter_run


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("batchsize", "batch_size"), ("mini_batch_size", "minibatch_size"), ("kl_coef", "init_kl_coef"),
     ("clip_range", "cliprange"), ("learning", "")],
)  # fmt: skip
def test_an_unknown_setting_suggests_the_nearest(wrong, near):
    with pytest.raises(ValueError, match=rf"{wrong}.*{near}"):
        make_trainer(**{wrong: 1})


COUNTS = ("steps", "batch_size", "forward_batch_size", "gen_len", "save_freq", "ppo_epochs", "minibatch_size")
POSITIVE = ("lr", "target", "horizon", "cliprange", "cliprange_value", "max_grad_norm", "adam_eps")
BAD_FIELDS = [
    *((name, value) for name in (*COUNTS, "group_size", "max_bad_steps") for value in (0, -1, 1.5, "4", None, True)),
    *((name, value) for name in POSITIVE for value in (0, -1.0, NAN, "1")),
    *((name, None) for name in POSITIVE if name != "max_grad_norm"),  # None: no clipping
    *((name, value) for name in ("init_kl_coef", "vf_coef", "entropy_coef") for value in (-0.1, NAN, "1")),
    *(("value_head_init", value) for value in (-0.1, NAN)),
    *((name, value) for name in ("gamma", "lam") for value in (-0.1, 1.1, NAN, "1")),
    *(("target_kl", value) for value in (0, -1.0, NAN, "1")),
    *(("temperature", value) for value in (0, -1.0, NAN, math.inf)),
    *(("top_p", value) for value in (0, 1.5, NAN)),
    *(("top_k", value) for value in (-1, 0.5)),
    *(("lr_schedule", value) for value in ("step", None)),
    *(("precision", value) for value in ("fp8", None)),
    *(("score_clip", value) for value in (0, -1.0)),
    *((name, value) for name in ("score_scale", "missing_eos_score") for value in (NAN, "1")),
    *((name, "other") for name in ("kl_estimator", "kl_placement", "missing_eos", "value_head", "reference")),
    *((name, "other") for name in ("whiten_scope", "loss_averaging", "score_position", "advantages")),
    *(("reward_timeout", value) for value in (0, -1.0, NAN, math.inf, "1")),
    ("whiten_ddof", 2),
    ("missing_eos", "replace"),  # without an eos_token_id
    ("lr", math.inf),
    ("device", "nowhere"),
    ("gen_len", 65),
    ("eos_token_id", len(VOCAB)),
    ("eos_token_id", -1),
    ("eos_token_id", 1.5),
    ("eos_token_id", ()),
    ("eos_token_id", (1, -1)),
    ("eos_token_id", (1, len(VOCAB))),
    ("temperature", "1"),
    ("top_p", "1"),
    ("seed", 1.5),
    ("seed", "a"),
    ("adaptive_kl", "no"),
    ("whiten_advantages", 1),
    ("logprobs_full_softmax", "no"),
    *(("cliprange_high", value) for value in (0, -1.0, NAN, "1")),
    *(("drop_flat_groups", value) for value in (-1, 0.5, None)),
    *(("reward_workers", value) for value in (-1, 0.5, None)),
    ("policy_ratio", "other"),
    ("sharding", "half"),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_a_bad_setting_is_refused_by_its_name(field, value):
    with pytest.raises(ValueError, match=field):
        make_trainer(**{field: value})


@pytest.mark.parametrize(("field", "value"), [
    ("precision", "auto"), ("precision", "fp16"), ("reference", "shared"), ("reference", "adapters off"),
    ("lora", LoRAConfig()), ("compile", True), ("cuda_graphs", True),
])  # fmt: skip
def test_what_sharding_cannot_be_combined_with_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"PPOConfig\.{field} must be .* with sharding='full'"):
        PPOConfig(**{"precision": "fp32", "sharding": "full", field: value})


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPOConfig().lr = 1.0


def test_overrides_replace_fields_of_a_given_config():
    base = PPOConfig(lr=0.5, gen_len=3)
    config = PPOConfig.with_overrides(base, lr=0.25)
    assert (config.lr, config.gen_len, base.lr) == (0.25, 3, 0.5)


def test_every_preset_trains():
    assert list(PRESETS) == ["original", "oai2019", "trl2020", "trl0.11", *METHODS]
    for name in PRESETS:
        groups = dict(group_size=2) if PRESETS[name].get("group_size", 1) > 1 else {}
        config = PPOConfig.preset(name, **DEFAULTS, **groups)
        trainer = PPOTrainer(make_gpt2(0, **SMALL), make_gpt2(1, **SMALL), Tokenizer(VOCAB), config)
        stats = trainer.step(trainer.collect(PROMPTS[: 4 // config.group_size], reward))
        assert (trainer.policy.value_head is None) == (name in METHODS)
        assert all(math.isfinite(value) for value in stats.values()), name
    with pytest.raises(ValueError, match="trl2020"):
        PPOConfig.preset("trl2021")


def test_overrides_for_editors_are_the_fields_of_the_config():
    fields = {field.name for field in dataclasses.fields(PPOConfig)}
    assert list(PPOOverrides.__annotations__) == [field.name for field in dataclasses.fields(PPOConfig)]
    assert get_type_hints(PPOOverrides) == {n: t for n, t in get_type_hints(PPOConfig).items() if n in fields}


@pytest.mark.parametrize("placement", ["reward", "loss"])
@pytest.mark.parametrize("kind", KL_ESTIMATORS)
def test_a_leash_that_does_not_pull_is_refused_with_those_that_do(kind, placement):
    if (kind, placement) in KL_PLACEMENTS:
        assert PPOConfig(kl_estimator=kind, kl_placement=placement).kl_in_loss == (kind != "k1")
        return
    message = f"kl_placement .*pulls .*kl_estimator='{kind}'.*k1 in the reward, exact in the reward, k2 in the loss, k3"
    with pytest.raises(ValueError, match=f"{message} in the loss.*got '{placement}'"):
        PPOConfig(kl_estimator=kind, kl_placement=placement)


@pytest.mark.parametrize("sizes", [(6, 4, 4), (8, 6, 4), (4, 2, 4)])
def test_groups_that_would_be_cut_are_refused(sizes):
    batch_size, minibatch_size, group_size = sizes
    with pytest.raises(ValueError, match="group_size must be a divisor of batch_size and minibatch_size"):
        PPOConfig(batch_size=batch_size, minibatch_size=minibatch_size, group_size=group_size)


@pytest.mark.parametrize("settings", [
    *(dict(advantages=name) for name in ("rloo", "rloo_to_go", "grpo", "dr_grpo")), dict(drop_flat_groups=3),
])  # fmt: skip
def test_a_method_that_compares_responses_needs_two_of_each_prompt(settings):
    with pytest.raises(ValueError, match=r"group_size must be at least 2 for advantages=.*, got 1"):
        PPOConfig(**settings)
    PPOConfig(**settings, group_size=2)


@pytest.mark.parametrize(("settings", "message"), [
    *((dict(advantages=name, gamma=0.9), f"gamma must be 1 for '{name}', which compares whole returns")
      for name in ("rloo", "grpo", "dr_grpo")),
    (dict(advantages="rloo_to_go", whiten_rewards=True), "whiten_rewards must be False for 'rloo_to_go'"),
    (dict(advantages="reinforce", value_head="tanh"), "value_head must be None for 'reinforce', which has no values"),
    (dict(cliprange_high=0.1), "cliprange_high must be at least cliprange, 0.2, or None, got 0.1"),
])  # fmt: skip
def test_what_a_method_does_not_read_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings, group_size=2)
    PPOConfig(advantages="rloo_to_go", group_size=2, gamma=0.9, cliprange_high=0.2)


def test_reinforce_plus_plus_is_whitened():
    with pytest.raises(ValueError, match=r"whiten_advantages must be True for 'reinforce\+\+'"):
        PPOConfig(advantages="reinforce++", whiten_advantages=False)


@pytest.mark.parametrize(("name", "field", "value"), [
    ("grpo", "advantages", "gae"),
    ("rloo", "advantages", "grpo"),
    ("dr_grpo", "loss_averaging", "sequences"),
    ("dapo", "whiten_advantages", True),
    ("gspo", "policy_ratio", "token"),
    ("reinforce++", "whiten_scope", "sequence"),
    ("dapo", "drop_flat_groups", 0),
    ("dapo", "cliprange_high", None),
    ("gspo", "cliprange_high", None),
])  # fmt: skip
def test_a_method_s_preset_stays_that_method(name, field, value):
    with pytest.raises(ValueError, match=f"{field} must be .* in preset '{re.escape(name)}', got {value!r}"):
        PPOConfig.preset(name, **{field: value})
    own = getattr(PPOConfig.preset(name), field)
    assert getattr(PPOConfig.preset(name, **{field: own}), field) == own != value


@pytest.mark.parametrize(("name", "estimator", "placement"), [("grpo", "k1", "reward"), ("rloo", "k3", "loss")])
def test_a_method_s_kl_stays_where_it_is(name, estimator, placement):
    with pytest.raises(ValueError, match=f"kl_placement must be .* in preset '{name}', got {placement!r}"):
        PPOConfig.preset(name, kl_estimator=estimator, kl_placement=placement)


def test_the_original_recipe_takes_a_step_a_sample():
    config = PPOConfig.preset("original")
    assert (config.minibatch_size, config.batch_size, config.ppo_epochs, config.max_grad_norm) == (1, 128, 4, None)


@pytest.mark.parametrize("name", METHODS)
def test_on_the_starter_weights_a_method_keeps_its_own_kl_and_clip_range(name):
    own, config = PPOConfig(**PRESETS[name]), PPOConfig(**starter_run(name))
    assert (config.steps, config.lr, config.ppo_epochs) == (10240, 1.2e-4, 1)
    if name == DEFAULT_METHOD:
        assert starter_run(name) == starter_run("ppo") | PRESETS[name] and config.init_kl_coef == 0.11
    else:
        assert (config.init_kl_coef, config.adaptive_kl) == (own.init_kl_coef, own.adaptive_kl)
        assert name == "gspo" or config.cliprange == own.cliprange == 0.2
    assert config.cliprange_high is None or config.cliprange < config.cliprange_high


def test_the_preset_of_a_method_with_groups_of_one_is_refused():
    compared = [name for name in METHODS if "group_size" in PRESETS[name]]
    assert compared == ["rloo", "rloo_to_go", "grpo", "dr_grpo", "dapo", "gspo"]
    for name in compared:
        with pytest.raises(ValueError, match="group_size must be at least 2"):
            PPOConfig.preset(name, group_size=1)


def test_gae_on_a_policy_without_a_value_head_is_refused(tokenizer):
    policy, reference = make_gpt2(0, **SMALL), make_gpt2(1, **SMALL)
    with pytest.raises(ValueError, match=r"advantages='gae' needs a value head, and the policy has none: .*decoder"):
        PPOTrainer(ActorCritic(policy, None), reference, tokenizer)
    assert PPOTrainer(policy, reference, tokenizer, **DEFAULTS).policy.value_head is not None
    groups = dict(advantages="rloo", group_size=2)
    trainer = PPOTrainer(ActorCritic(policy, None), reference, tokenizer, **DEFAULTS, **groups)
    assert trainer.policy.value_head is None


def test_a_dict_in_the_place_of_the_config_is_refused_with_what_makes_one():
    with pytest.raises(
        ValueError, match=r"config must be a PPOConfig, got a dict: of a dict it is PPOConfig\(\*\*config\)"
    ):
        PPOConfig.with_overrides({"lr": 1e-4})


def test_numpy_s_numbers_are_ids_alone_and_in_a_list():
    config = PPOConfig(eos_token_id=[np.int64(3), 4])
    assert config.eos_token_id == (3, 4) and all(type(i) is int for i in config.eos_token_id)
