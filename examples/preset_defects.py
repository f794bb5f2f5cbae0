"""What the known defects of other implementations do, each in a small experiment on a random GPT-2.

    python examples/preset_defects.py

Prints a Markdown table; every row compares this library's default with one switch of `PPOConfig`.
"""

import torch

from minirlhf import GPT2, ActorCritic, GPT2Config, PPOConfig, PPOTrainer, Rollout, Tokenizer
from minirlhf.rl import ppo

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"酒店周围位置前台房间干净服务很好非常满意早餐"]
EOS, BATCH, LENGTH = 3, 128, 16


def main() -> None:
    print("| defect | measured | default | with the defect |\n|---|---|---|---|")
    for experiment in (whitening, learning, full_softmax_kl, micro_batch_means, last_column):
        print("| " + " | ".join(experiment()) + " |", flush=True)


def whitening() -> tuple[str, ...]:
    """Does a row with a good score have larger advantages than one with a bad score?"""
    correlations = []
    for scope in ("batch", "sequence"):
        trainer = make_trainer(whiten_scope=scope)
        rollout = sample(trainer)
        rewards = ppo.token_rewards(rollout.scores, torch.zeros_like(rollout.logprobs), 0.0, rollout.response_mask)
        advantages, _ = trainer.advantages(rewards, rollout.values, rollout.response_mask)
        rows = torch.stack([rollout.scores, advantages.sum(-1) / rollout.response_mask.sum(-1)])
        correlations.append(f"{torch.nan_to_num(torch.corrcoef(rows))[0, 1]:.2f}")
    return "`whiten_scope=sequence`", "correlation of a row's score with its mean advantage", *correlations


def learning() -> tuple[str, ...]:
    """The same, as mean score after 60 steps."""
    scores = []
    for scope in ("batch", "sequence"):
        trainer = make_trainer(whiten_scope=scope, lr=2e-3, eos_token_id=None, init_kl_coef=0.0)
        for _ in range(60):
            rollout = sample(trainer)
            trainer.step(rollout)
        scores.append(f"{rollout.scores.mean():.2f}")
    return "`whiten_scope=sequence`", "mean score after 60 steps (share of wanted characters)", *scores


def full_softmax_kl() -> tuple[str, ...]:
    """KL of a policy that has moved, sampled with top-p 0.5."""
    values = []
    for full in (False, True):
        trainer = make_trainer(score_full_softmax=full, top_p=0.5, eos_token_id=None, init_kl_coef=0.0)
        with torch.no_grad():  # the policy becomes flatter than the reference
            trainer.policy.gpt2.ln_f.weight.mul_(0.7)
        rollout = trainer.collect(["酒店"] * BATCH, score)
        values.append(f"{(rollout.logprobs - rollout.ref_logprobs).sum(-1).mean():.2f} nats")
    return "`score_full_softmax`, top-p .5", "mean k1 KL a sequence", *values


def micro_batch_means() -> tuple[str, ...]:
    """The gradient of one ragged minibatch of 16, in micro-batches of 1 against all at once."""
    changes = []
    for averaging in ("tokens", "micro_batches"):
        gradients = []
        for size in (16, 1):
            trainer = make_trainer(loss_averaging=averaging, forward_batch_size=size, minibatch_size=16, ppo_epochs=1)
            rollout = sample(trainer, 16)
            before = [p.detach().clone() for p in trainer.parameters]
            trainer.optimizer = torch.optim.SGD(trainer.parameters, lr=1.0)  # the step is the gradient
            trainer.step(rollout)
            gradients.append(torch.cat([(b - p).flatten() for b, p in zip(before, trainer.parameters, strict=True)]))
        changes.append(f"{(gradients[0] - gradients[1]).norm() / gradients[0].norm():.1e}")
    return "`loss_averaging=micro_batches`", "relative change of the gradient by cutting a minibatch", *changes


def last_column() -> tuple[str, ...]:
    """How many responses, ended by an end-of-text token, get their score at all?"""
    shares = []
    for position in ("last_token", "last_column"):
        rollout = sample(make_trainer())
        ones = torch.ones(len(rollout))
        rewards = ppo.token_rewards(ones, torch.zeros_like(rollout.logprobs), 0.0, rollout.response_mask, position)
        shares.append(f"{rewards.sum() / len(rollout):.0%}")
    return "`score_position=last_column`", "responses whose score reaches the rewards", *shares


def make_trainer(**overrides) -> PPOTrainer:
    config = GPT2Config(vocab_size=len(VOCAB), n_positions=32, n_embd=64, n_layer=2, n_head=4, initializer_range=0.3)
    policy, reference = ActorCritic(GPT2(config, seed=0)), GPT2(config, seed=0)
    base = PPOConfig(batch_size=BATCH, gen_len=LENGTH, top_p=1.0, lr=1e-4, eos_token_id=EOS, max_grad_norm=None)
    return PPOTrainer(policy, reference, Tokenizer(VOCAB), base, device="cpu", **overrides)


def score(texts: list[str]) -> list[float]:
    """The share of wanted characters."""
    return [sum(text.count(char) for char in "干净很好满意") / len(text) for text in texts]


def sample(trainer: PPOTrainer, count: int = BATCH) -> Rollout:
    return trainer.collect(["酒店"] * count, score)


if __name__ == "__main__":
    main()
