"""What TRL, OpenRLHF, verl, transformers and baselines call the fields of PPOConfig, for errors on unknown names."""

from __future__ import annotations

# Field of PPOConfig or None, a remark where the unit or the meaning differs: its names elsewhere.
_NAMES: dict[tuple[str | None, str], str] = {
    ("lr", ""): "learning_rate",
    ("lr", "one rate for policy and value head"):
        "actor_learning_rate critic_learning_rate policy_lr actor_lr critic_lr value_lr lr_actor lr_critic",
    ("lr_schedule", ""): "lr_scheduler lr_scheduler_type",
    ("adam_eps", ""): "adam_epsilon",
    ("max_grad_norm", ""): "max_norm grad_norm grad_clip clip_grad clip_grad_norm grad_norm_clip gradient_clipping",
    (None, "AdamW runs with betas (0.9, 0.999)"): "betas beta1 beta2 adam_beta1 adam_beta2 adam_betas",
    (None, "the optimizer is AdamW"): "optim optimizer",
    (None, "AdamW runs without weight decay"): "weight_decay",
    (None, "there is no warm-up of the learning rate"): "warmup warmup_steps warmup_ratio num_warmup_steps",
    ("steps", "steps counts episodes (sequences) of the whole run"):
        "total_episodes num_episodes total_ppo_epochs total_timesteps",
    ("steps", "steps counts episodes: iterations times batch_size"):
        "num_train_steps max_steps total_steps total_training_steps iterations",
    ("steps", "steps counts episodes: epochs times the number of prompts"): "num_train_epochs",
    ("batch_size", "in sequences an iteration"): "rollout_batch_size n_steps",
    ("batch_size", "in sequences an iteration, of all processes"): "global_batch_size",
    ("minibatch_size", "in sequences an optimizer step"):
        "train_batch_size mini_batch_size ppo_mini_batch_size backward_batch_size global_backward_batch_size",
    ("minibatch_size", "batch_size / their number, in sequences"): "num_mini_batches num_minibatches nminibatches",
    ("forward_batch_size", "in sequences a forward pass"):
        "per_device_train_batch_size local_rollout_forward_batch_size micro_train_batch_size "
        "micro_batch_size ppo_micro_batch_size ppo_micro_batch_size_per_gpu",
    ("forward_batch_size", "minibatch_size sequences a step, this many a forward pass"):
        "gradient_accumulation_steps grad_accum grad_accum_steps",
    ("ppo_epochs", "passes over each batch"):
        "num_ppo_epochs noptepochs update_epochs max_epochs n_epochs num_iterations",
    ("save_freq", "in iterations"): "save_steps save_interval save_every",
    ("group_size", "responses a prompt"):
        "num_generations n_samples_per_prompt rollout_n n_samples num_responses num_return_sequences",
    ("drop_flat_groups", "in rounds of sampling anew"): "filter_groups dynamic_filtering max_num_gen_batches",
    ("advantages", ""): "adv_estimator advantage_estimator",
    ("loss_averaging", "tokens, sequences or gen_len"): "loss_agg_mode loss_type",
    ("policy_ratio", ""): "importance_sampling_level",
    ("whiten_advantages", 'False for methods with their own scale; "dr_grpo" has none'): "scale_rewards",
    ("gen_len", "in new tokens a prompt, without the prompt"):
        "max_new_tokens response_length generate_max_len max_response_length max_completion_length max_length "
        "max_gen_len output_len",
    (None, "prompts are not cut: one without room for gen_len tokens is refused"): "max_prompt_length max_query_length",
    (None, "padding is the tokenizer's"): "pad_token_id pad_token",
    ("eos_token_id", "the id of the token"): "stop_token eos_token stop_token_id eos_id eos stop",
    ("temperature", ""): "sampling_temperature temp",
    ("top_p", ""): "nucleus",
    ("missing_eos_score", 'with missing_eos="subtract", as a number that is subtracted'): "missing_eos_penalty",
    ("missing_eos", '"replace" or "subtract"'): "non_eos_penalty",
    (None, "tokens are always sampled; top_k=1 is greedy"): "do_sample",
    (None, "PPO needs samples whose probabilities are known"):
        "repetition_penalty presence_penalty frequency_penalty no_repeat_ngram_size length_penalty num_beams "
        "min_length min_new_tokens min_p typical_p",
    ("lam", ""): "gae_lambda lambd lmbda",
    ("gamma", ""): "discount",
    ("cliprange", ""):
        "eps_clip clip clip_low clip_eps clip_range clip_ratio clip_param epsilon ppo_clip epsilon_low clip_ratio_low",
    ("cliprange_high", "of ratios above 1"): "epsilon_high clip_ratio_high eps_clip_high clip_higher",
    ("cliprange_value", ""): "value_clip value_clip_range clip_range_vf cliprange_vf vf_clip_param vf_clip",
    ("vf_coef", ""): "critic_coef value_loss_coef vf_loss_coeff",
    ("entropy_coef", ""): "ent_coef entropy_coeff entropy entropy_bonus",
    ("whiten_scope", "advantages are whitened over a batch, a minibatch or a sequence"):
        "norm_adv adv_norm normalize_advantage",
    ("score_scale", "a factor; 1 for none"): "use_score_scaling reward_scale",
    (None, "scores are not normalised by running statistics"): "use_score_norm reward_norm",
    ("score_clip", "scores are clipped to +- this"): "reward_clip reward_clip_range cliprange_reward",
    ("init_kl_coef", "with adaptive_kl=False it stays"):
        "kl_coef kl_coeff kl_coefficient kl_penalty_coef kl_weight kl_beta beta",
    ("init_kl_coef", 'with kl_placement="loss"'): "kl_loss_coef",
    ("adaptive_kl", ""): "adap_kl_ctrl use_adaptive_kl",
    ("target", "KL in nats a sequence"): "kl_target",
    ("horizon", "in episodes"): "kl_horizon",
    ("kl_estimator", "k1 (TRL's kl), k2 (mse), k3 or exact (full)"): "kl_penalty kl_loss_type",
    ("kl_placement", '"loss" or "reward"'): "use_kl_loss",
    ("target_kl", "nats a token; None: no early stopping"): "early_stopping",
    (None, "no minibatch is left out for its ratio; target_kl ends the epochs of a batch"): "ratio_threshold",
    ("precision", '"bf16", "fp16" or another'): "bf16 fp16 dtype torch_dtype mixed_precision",
    ("checkpoint_activations", ""): "gradient_checkpointing",
    ("compile", ""): "torch_compile",
    ("lora", "a LoRAConfig"):
        "peft_config lora_config lora_r lora_rank lora_alpha lora_dropout lora_target_modules "
        "use_lora is_peft_model",
    ("device", '"cpu"'): "use_cpu",
    ("seed", ""): "random_seed",
    (None, "memory is kept between steps"): "optimize_cuda_cache optimize_device_cache",
    (None, "torchrun starts several processes"): "world_size accelerator_kwargs",
    (None, "models are handed to PPOTrainer"): "model model_name model_name_or_path ref_model tokenizer",
    (None, "the policy is a decoder"): "is_encoder_decoder",
    (None, "prompts are handed to PPOTrainer.train"):
        "dataset train_dataset query_dataset dataset_num_proc remove_unused_columns data_collator",
    (None, "rewards are callables that are handed to PPOTrainer.train"):
        "reward_model reward_model_path reward_fn reward_funcs",
    (None, "a Run, or on_step of PPOTrainer.train, logs"):
        "log_with report_to logging_steps tracker_project_name num_sample_generations run_name exp_name task_name "
        "tracker_kwargs",
    (None, "the folder is an argument of Run.start"): "output_dir logging_dir project_kwargs",
    (None, "keep_last of Run.start says how many checkpoints stay"): "save_total_limit",
    (None, "evaluate_every of PPOTrainer.train"): "eval_steps eval_strategy",
    (None, "save_best of PPOTrainer.train keeps the best policy"): "compare_steps push_to_hub_if_best_kwargs",
}  # fmt: skip
FIELD_NAMES = {name: meant for meant, names in _NAMES.items() for name in names.split()}
