"""Unknown names of settings: the field that is meant by meaning, then by spelling, and no hint that misleads."""

import copy
import dataclasses
import pickle

import pytest

from minirlhf import PPOConfig
from minirlhf.common.field_names import FIELD_NAMES
from minirlhf.common.suggestions import suggest

FIELDS = {field.name for field in dataclasses.fields(PPOConfig)}


@pytest.mark.parametrize(("name", "field", "unit"), [
    ("learning_rate", "lr", ""), ("max_new_tokens", "gen_len", "new tokens a prompt"), ("gae_lambda", "lam", ""),
    ("eps_clip", "cliprange", ""), ("cliprange_vf", "cliprange_value", ""), ("clip_ratio", "cliprange", ""),
    ("kl_coef", "init_kl_coef", "adaptive_kl=False"), ("total_episodes", "steps", "episodes"),
    ("num_mini_batches", "minibatch_size", "sequences"),
    ("gradient_accumulation_steps", "forward_batch_size", "sequences"),
    ("per_device_train_batch_size", "forward_batch_size", "sequences a forward pass"),
    ("num_ppo_epochs", "ppo_epochs", ""), ("mini_batch_size", "minibatch_size", "sequences an optimizer step"),
    ("response_length", "gen_len", "tokens"), ("stop_token", "eos_token_id", "id"), ("critic_coef", "vf_coef", ""),
    ("ppo_micro_batch_size_per_gpu", "forward_batch_size", "sequences"), ("kl_target", "target", "nats a sequence"),
    ("max_steps", "steps", "iterations times batch_size"), ("bf16", "precision", "bf16"),
    ("sampling_temperature", "temperature", ""), ("LR-Scheduler-Type", "lr_schedule", ""),
    ("repetition_penalty", None, "probabilities are known"), ("do_sample", None, "top_k=1"), ("log_with", None, "Run"),
    ("reward_model_path", None, "PPOTrainer.train"), ("betas", None, "betas (0.9, 0.999)"), ("beta1", None, "AdamW"),
    ("pad_token_id", None, "tokenizer"), ("num_iterations", "ppo_epochs", "passes"), ("vf_clip", "cliprange_value", ""),
    ("num_sample_generations", None, "Run"), ("min_new_tokens", None, "probabilities"), ("n_steps", "batch_size", ""),
    ("kl_penalty_coef", "init_kl_coef", ""), ("grad_norm", "max_grad_norm", ""), ("use_lora", "lora", "LoRAConfig"),
])  # fmt: skip
def test_a_name_of_another_library_gives_the_field_and_its_unit(name, field, unit):
    with pytest.raises(ValueError, match=f"PPOConfig has no field '{name}'; ") as error:
        PPOConfig.with_overrides(**{name: 1})
    message = str(error.value)
    assert message.endswith(f"did you mean {field!r}?") if field else "did you mean" not in message
    assert unit in message


def test_the_config_itself_says_which_field_is_meant():
    with pytest.raises(ValueError, match="PPOConfig has no field 'learning_rate'; did you mean 'lr'"):
        PPOConfig(learning_rate=1e-5)
    config = PPOConfig(1280, 64, lr=1e-4)
    assert (config.steps, config.batch_size, config.lr) == (1280, 64, 1e-4)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_every_field_of_trls_last_stepwise_config_is_known():
    """The fields of `trl.PPOConfig`, 0.11.4, printed by `dataclasses.fields`."""
    trl = """exp_name seed log_with task_name model_name query_dataset reward_model remove_unused_columns tracker_kwargs
    accelerator_kwargs project_kwargs tracker_project_name push_to_hub_if_best_kwargs steps learning_rate adap_kl_ctrl
    init_kl_coef kl_penalty target horizon gamma lam cliprange cliprange_value vf_coef batch_size forward_batch_size
    mini_batch_size gradient_accumulation_steps world_size ppo_epochs max_grad_norm optimize_cuda_cache
    optimize_device_cache early_stopping target_kl compare_steps ratio_threshold use_score_scaling use_score_norm
    score_clip whiten_rewards gradient_checkpointing is_encoder_decoder is_peft_model backward_batch_size
    global_backward_batch_size global_batch_size dataset_num_proc"""
    assert set(trl.split()) <= FIELDS | set(FIELD_NAMES)


def test_every_field_that_is_suggested_exists_and_no_field_is_in_the_table():
    assert {field for field, _ in FIELD_NAMES.values() if field is not None} <= FIELDS
    assert not FIELDS & set(FIELD_NAMES)
    assert all(name == name.lower() for name in FIELD_NAMES)


@pytest.mark.parametrize(("name", "meant"), [
    ("lrr", "lr"), ("batch_sise", "batch_size"), ("learning_rat", "lr"), ("max_new_token", "gen_len"),
])  # fmt: skip
def test_a_slip_of_the_finger_is_put_right(name, meant):
    assert suggest(name, FIELDS, FIELD_NAMES).endswith(f"did you mean {meant!r}?")


def test_a_name_like_no_other_gets_the_list_and_no_guess():
    assert suggest("frobnicate", ["lr", "seed"], {}) == "the known names are lr, seed"


def test_a_meaning_that_is_not_known_here_is_no_suggestion():
    """A table may be of another config: an entry that leads to a field which is not there does not count."""
    assert suggest("kl_coef", ["lr"], {"kl_coef": ("init_kl_coef", "")}) == "the known names are lr"
