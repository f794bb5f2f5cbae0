"""What TRL, OpenRLHF, verl, transformers and baselines call the fields of PPOConfig, for errors on unknown names."""

from __future__ import annotations

# Field of PPOConfig or None, a remark where the unit or the meaning differs: its names elsewhere.
_NAMES: dict[tuple[str | None, str], str] = {
    ("lr", ""): "learning_rate",
    ("lr", "one rate for policy and value head"): "actor_learning_rate critic_learning_rate policy_lr",
    ("lr_schedule", ""): "lr_scheduler lr_scheduler_type",
    ("adam_eps", ""): "adam_epsilon",
    ("max_grad_norm", ""): "max_norm grad_clip clip_grad gradient_clipping",
    (None, "AdamW runs without weight decay"): "weight_decay",
    (None, "there is no warm-up of the learning rate"): "warmup_steps warmup_ratio",
    ("steps", "steps counts episodes (sequences) of the whole run"): "total_episodes num_episodes total_ppo_epochs",
    ("steps", "steps counts episodes: iterations times batch_size"): "num_train_steps max_steps total_training_steps",
    ("steps", "steps counts episodes: epochs times the number of prompts"): "num_train_epochs",
    ("batch_size", "in sequences an iteration"): "rollout_batch_size",
    ("minibatch_size", "in sequences an optimizer step"): "train_batch_size mini_batch_size ppo_mini_batch_size",
    ("minibatch_size", "batch_size / their number, in sequences"): "num_mini_batches num_minibatches nminibatches",
    ("forward_batch_size", "in sequences a forward pass"):
        "per_device_train_batch_size local_rollout_forward_batch_size micro_train_batch_size "
        "micro_batch_size ppo_micro_batch_size ppo_micro_batch_size_per_gpu",
    ("forward_batch_size", "minibatch_size sequences a step, this many a forward pass"): "gradient_accumulation_steps",
    ("ppo_epochs", "passes over each batch"): "num_ppo_epochs noptepochs update_epochs max_epochs",
    ("save_freq", "in iterations"): "save_steps save_interval",
    ("group_size", "responses a prompt"): "num_generations n_samples_per_prompt rollout_n",
    ("gen_len", "in new tokens a prompt, without the prompt"):
        "max_new_tokens response_length generate_max_len max_response_length max_completion_length max_length",
    ("eos_token_id", "the id of the token"): "stop_token eos_token stop_token_id",
    ("temperature", ""): "sampling_temperature",
    ("top_p", ""): "nucleus",
    ("missing_eos_score", 'with missing_eos="subtract", as a number that is subtracted'): "missing_eos_penalty",
    ("missing_eos", '"replace" or "subtract"'): "non_eos_penalty",
    (None, "tokens are always sampled; top_k=1 is greedy"): "do_sample",
    (None, "PPO needs samples whose probabilities are known"):
        "repetition_penalty no_repeat_ngram_size length_penalty num_beams min_length",
    ("lam", ""): "gae_lambda lambd lmbda",
    ("gamma", ""): "discount",
    ("cliprange", ""): "eps_clip clip_eps clip_range clip_ratio clip_param epsilon",
    ("cliprange_value", ""): "value_clip clip_range_vf cliprange_vf vf_clip_param",
    ("vf_coef", ""): "critic_coef value_loss_coef vf_loss_coeff",
    ("entropy_coef", ""): "ent_coef entropy_coeff",
    ("whiten_scope", "advantages are whitened over a batch, a minibatch or a sequence"): "norm_adv normalize_advantage",
    ("score_scale", "a factor; 1 for none"): "use_score_scaling reward_scale",
    ("score_clip", "scores are clipped to +- this"): "reward_clip reward_clip_range cliprange_reward",
    ("init_kl_coef", "with adaptive_kl=False it stays"): "kl_coef beta",
    ("init_kl_coef", 'with kl_placement="loss"'): "kl_loss_coef",
    ("adaptive_kl", ""): "adap_kl_ctrl use_adaptive_kl",
    ("target", "KL in nats a sequence"): "kl_target",
    ("horizon", "in episodes"): "kl_horizon",
    ("kl_estimator", "k1 (TRL's kl), k2 (mse), k3 or exact (full)"): "kl_penalty kl_loss_type",
    ("kl_placement", '"loss" or "reward"'): "use_kl_loss",
    ("target_kl", "nats a token; None: no early stopping"): "early_stopping",
    ("precision", '"bf16", "fp16" or another'): "bf16 fp16 dtype torch_dtype mixed_precision",
    ("checkpoint_activations", ""): "gradient_checkpointing",
    ("compile", ""): "torch_compile",
    ("device", '"cpu"'): "use_cpu",
    ("seed", ""): "random_seed",
    (None, "models are handed to PPOTrainer"): "model_name model_name_or_path",
    (None, "rewards are callables that are handed to PPOTrainer.train"): "reward_model reward_model_path",
    (None, "a Run, or on_step of PPOTrainer.train, logs"): "log_with report_to logging_steps tracker_project_name",
    (None, "the folder is an argument of Run.start"): "output_dir",
}  # fmt: skip
FIELD_NAMES = {name: meant for meant, names in _NAMES.items() for name in names.split()}
