# pyright: reportUnnecessaryTypeIgnoreComment=true
"""Read by type checkers alone: a wrong name or type of a setting is an error where it is written.

`warn_unused_ignores` of mypy, and the line above for pyright, make each of these comments an assertion.
"""

from minirlhf import GPT2, DPOConfig, DPOTrainer, PPOConfig, PPOTrainer, Tokenizer


def settings(policy: GPT2, reference: GPT2, tokenizer: Tokenizer) -> None:
    PPOTrainer(policy, reference, tokenizer, lr=1e-4, kl_estimator="exact", max_grad_norm=None)
    PPOTrainer(policy, reference, tokenizer, learning_rate=1e-4)  # type: ignore[call-arg]
    PPOTrainer(policy, reference, tokenizer, lr="1e-4")  # type: ignore[arg-type]
    PPOTrainer(policy, reference, tokenizer, kl_estimator="k4")  # type: ignore[arg-type]
    PPOConfig.preset("trl2020", whiten_scope="rows")  # type: ignore[arg-type]
    PPOConfig.preset("gspo", policy_ratio="row")  # type: ignore[arg-type]
    PPOConfig(batch_size=2.5)  # type: ignore[arg-type]
    DPOTrainer(policy, None, tokenizer, loss="ipo", reference_free=True, beta=0.5)
    DPOTrainer(policy, reference, tokenizer, learning_rate=1e-4)  # type: ignore[call-arg]
    DPOTrainer(policy, reference, tokenizer, loss="hinge")  # type: ignore[arg-type]
    DPOConfig.with_overrides(None, beta="0.1")  # type: ignore[arg-type]
