"""What other libraries call the fields of PPOConfig, for the error on an unknown name.

The names are of TRL (0.11 and later), OpenRLHF, verl, transformers' TrainingArguments and GenerationConfig, and
baselines' PPO2. Each has the field of PPOConfig, or None, and a remark where the unit or the meaning differs.
"""

from __future__ import annotations

_SAME = ""
_EPISODES = "steps counts episodes (sequences) of the whole run"
_MICRO = "in sequences a forward pass"
_MINI = "in sequences an optimizer step"
_COUNT = "minibatch_size is the size of a minibatch, batch_size / their number, in sequences"
_TOKENS = "in new tokens a prompt"
_NO_PENALTY = "there is none: PPO needs samples whose probabilities are known"
_REWARD = "rewards are callables that are handed to PPOTrainer.train"
_LOGGING = "metrics are logged by a Run or by the on_step of PPOTrainer.train"

# name elsewhere -> (field of PPOConfig or None, remark)
FIELD_NAMES: dict[str, tuple[str | None, str]] = {
    # learning rate and optimizer
    "learning_rate": ("lr", _SAME),
    "actor_learning_rate": ("lr", "one rate for policy and value head"),
    "critic_learning_rate": ("lr", "one rate for policy and value head"),
    "policy_lr": ("lr", "one rate for policy and value head"),
    "lr_scheduler": ("lr_schedule", _SAME),
    "lr_scheduler_type": ("lr_schedule", _SAME),
    "adam_epsilon": ("adam_eps", _SAME),
    "max_norm": ("max_grad_norm", _SAME),
    "grad_clip": ("max_grad_norm", _SAME),
    "clip_grad": ("max_grad_norm", _SAME),
    "gradient_clipping": ("max_grad_norm", _SAME),
    "weight_decay": (None, "AdamW runs without weight decay"),
    "warmup_steps": (None, "there is no warm-up of the learning rate"),
    "warmup_ratio": (None, "there is no warm-up of the learning rate"),
    # counts and sizes
    "total_episodes": ("steps", _EPISODES),
    "num_episodes": ("steps", _EPISODES),
    "total_ppo_epochs": ("steps", f"{_EPISODES}, so batches times batch_size"),
    "num_train_steps": ("steps", f"{_EPISODES}, so iterations times batch_size"),
    "max_steps": ("steps", f"{_EPISODES}, so iterations times batch_size"),
    "total_training_steps": ("steps", f"{_EPISODES}, so iterations times batch_size"),
    "num_train_epochs": ("steps", f"{_EPISODES}, so epochs times the number of prompts"),
    "rollout_batch_size": ("batch_size", "in sequences an iteration"),
    "train_batch_size": ("minibatch_size", _MINI),
    "mini_batch_size": ("minibatch_size", _MINI),
    "ppo_mini_batch_size": ("minibatch_size", _MINI),
    "num_mini_batches": ("minibatch_size", _COUNT),
    "num_minibatches": ("minibatch_size", _COUNT),
    "nminibatches": ("minibatch_size", _COUNT),
    "per_device_train_batch_size": ("forward_batch_size", _MICRO),
    "local_rollout_forward_batch_size": ("forward_batch_size", _MICRO),
    "micro_train_batch_size": ("forward_batch_size", _MICRO),
    "micro_batch_size": ("forward_batch_size", _MICRO),
    "ppo_micro_batch_size": ("forward_batch_size", _MICRO),
    "ppo_micro_batch_size_per_gpu": ("forward_batch_size", _MICRO),
    "gradient_accumulation_steps": (
        "forward_batch_size",
        "it follows from the sizes: minibatch_size sequences a step, forward_batch_size a forward pass",
    ),
    "num_ppo_epochs": ("ppo_epochs", _SAME),
    "noptepochs": ("ppo_epochs", _SAME),
    "update_epochs": ("ppo_epochs", _SAME),
    "max_epochs": ("ppo_epochs", "passes over each batch"),
    "save_steps": ("save_freq", "in iterations"),
    "save_interval": ("save_freq", "in iterations"),
    "num_generations": (None, "responses a prompt: repeat the prompt in the batch"),
    # sampling
    "max_new_tokens": ("gen_len", _TOKENS),
    "response_length": ("gen_len", _TOKENS),
    "generate_max_len": ("gen_len", _TOKENS),
    "max_response_length": ("gen_len", _TOKENS),
    "max_completion_length": ("gen_len", _TOKENS),
    "max_length": ("gen_len", f"{_TOKENS}, without the prompt"),
    "stop_token": ("eos_token_id", "the id of the token"),
    "stop_token_id": ("eos_token_id", _SAME),
    "eos_token": ("eos_token_id", "the id of the token"),
    "sampling_temperature": ("temperature", _SAME),
    "nucleus": ("top_p", _SAME),
    "missing_eos_penalty": ("missing_eos_score", 'with missing_eos="subtract", as a number that is subtracted'),
    "non_eos_penalty": ("missing_eos", '"replace" or "subtract"'),
    "do_sample": (None, "tokens are always sampled; top_k=1 is greedy"),
    "repetition_penalty": (None, _NO_PENALTY),
    "no_repeat_ngram_size": (None, _NO_PENALTY),
    "length_penalty": (None, _NO_PENALTY),
    "num_beams": (None, _NO_PENALTY),
    "min_length": (None, _NO_PENALTY),
    # the algorithm
    "gae_lambda": ("lam", _SAME),
    "lambd": ("lam", _SAME),
    "lmbda": ("lam", _SAME),
    "discount": ("gamma", _SAME),
    "eps_clip": ("cliprange", _SAME),
    "clip_eps": ("cliprange", _SAME),
    "clip_range": ("cliprange", _SAME),
    "clip_ratio": ("cliprange", _SAME),
    "clip_param": ("cliprange", _SAME),
    "epsilon": ("cliprange", _SAME),
    "value_clip": ("cliprange_value", _SAME),
    "clip_range_vf": ("cliprange_value", _SAME),
    "cliprange_vf": ("cliprange_value", _SAME),
    "vf_clip_param": ("cliprange_value", _SAME),
    "critic_coef": ("vf_coef", _SAME),
    "value_loss_coef": ("vf_coef", _SAME),
    "vf_loss_coeff": ("vf_coef", _SAME),
    "ent_coef": ("entropy_coef", _SAME),
    "entropy_coeff": ("entropy_coef", _SAME),
    "norm_adv": ("whiten_scope", "advantages are whitened over a batch, a minibatch or a sequence"),
    "normalize_advantage": ("whiten_scope", "advantages are whitened over a batch, a minibatch or a sequence"),
    "use_score_scaling": ("score_scale", "a factor; 1 for none"),
    "reward_scale": ("score_scale", "a factor; 1 for none"),
    "reward_clip": ("score_clip", _SAME),
    "reward_clip_range": ("score_clip", "scores are clipped to +- this"),
    "cliprange_reward": ("score_clip", "scores are clipped to +- this"),
    # KL
    "kl_coef": ("init_kl_coef", "with adaptive_kl=False it stays"),
    "kl_loss_coef": ("init_kl_coef", 'with kl_placement="loss"'),
    "beta": ("init_kl_coef", "with adaptive_kl=False it stays"),
    "adap_kl_ctrl": ("adaptive_kl", _SAME),
    "use_adaptive_kl": ("adaptive_kl", _SAME),
    "kl_target": ("target", "KL in nats a sequence"),
    "kl_horizon": ("horizon", "in episodes"),
    "kl_penalty": ("kl_estimator", "k1 (TRL's kl), k2 (mse), k3 or exact (full)"),
    "kl_loss_type": ("kl_estimator", "k1, k2, k3 or exact"),
    "use_kl_loss": ("kl_placement", '"loss" or "reward"'),
    "early_stopping": ("target_kl", "nats a token; None: no early stopping"),
    # the machine
    "bf16": ("precision", '"bf16"'),
    "fp16": ("precision", '"fp16"'),
    "dtype": ("precision", _SAME),
    "torch_dtype": ("precision", _SAME),
    "mixed_precision": ("precision", _SAME),
    "gradient_checkpointing": ("checkpoint_activations", _SAME),
    "torch_compile": ("compile", _SAME),
    "use_cpu": ("device", '"cpu"'),
    "random_seed": ("seed", _SAME),
    # what is no setting here
    "model_name": (None, "models are handed to PPOTrainer"),
    "model_name_or_path": (None, "models are handed to PPOTrainer"),
    "reward_model": (None, _REWARD),
    "reward_model_path": (None, _REWARD),
    "log_with": (None, _LOGGING),
    "report_to": (None, _LOGGING),
    "logging_steps": (None, _LOGGING),
    "tracker_project_name": (None, _LOGGING),
    "output_dir": (None, "the folder is an argument of Run.start"),
}
