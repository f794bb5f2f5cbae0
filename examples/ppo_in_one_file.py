"""PPO for language models in one file: the whole algorithm in plain PyTorch, read from top to bottom.

    python examples/ppo_in_one_file.py [--iterations 40 --seed 0]       # a few minutes on two CPU cores

A small GPT-2 (the policy) continues prompts such as 酒店 (hotel). A classifier scores each text: the reward is
P(the review is positive). PPO makes the tokens of well-scored texts likelier, and a KL penalty keeps the policy near
the model that it started from (the reference), so that it still writes reviews and not whatever fools the classifier.

Each iteration:

    1. rollout             sample a response to each prompt
    2. reward              score each text
    3. log-probabilities   of the sampled tokens under policy and reference, and the value of each state
    4. token rewards       -beta * KL at each token, plus the score at the last one
    5. advantages          generalized advantage estimation: how much better than expected each token was
    6. whitening           advantages with mean 0 and variance 1
    7. update              several epochs of the clipped objective, in shuffled minibatches

The library provides the two models and the tokenizer; `minirlhf/rl/` has the same algorithm with end-of-text tokens,
16-bit precision, GPUs, checkpoints and more. `tests/examples/test_ppo_in_one_file.py` shows that both give the same
numbers.

Papers: Schulman et al. 2017 (PPO), Schulman et al. 2016 (GAE), Ziegler et al. 2019 (PPO on language models).
Shapes: B texts, P prompt tokens, R response tokens, T = P + R, V vocabulary, C width of the hidden states.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minirlhf import GPT2, SentimentReward, Tokenizer

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
PROMPTS = ["酒店", "周围", "位置", "前台"]  # hotel, surroundings, location, front desk


@dataclass(frozen=True)
class Settings:
    iterations: int = 40
    batch_size: int = 128  # B, texts an iteration
    gen_len: int = 16  # R, tokens sampled after each prompt
    top_p: float = 0.95  # sample from the most probable tokens that have this mass together
    ppo_epochs: int = 4  # passes over each batch
    minibatch_size: int = 32  # texts an optimizer step
    lr: float = 2e-4
    max_grad_norm: float = 1.0
    cliprange: float = 0.2  # of the probability ratio
    cliprange_value: float = 0.2
    vf_coef: float = 0.1  # weight of the value loss
    entropy_coef: float = 0.016  # weight of the entropy bonus
    gamma: float = 1.0  # discount
    lam: float = 0.95  # lambda of GAE
    init_kl_coef: float = 0.15  # beta, the weight of the KL penalty; a controller adapts it
    target: float = 6.0  # KL a text, nats, that the controller aims at
    horizon: float = 10000.0  # texts; the controller's time scale
    seed: int = 0


def train(
    policy: GPT2,
    reference: GPT2,
    tokenizer: Tokenizer,
    reward: Callable[[list[str]], Tensor],
    prompts: list[str],
    s: Settings,
) -> Iterator[tuple[dict[str, float], list[str]]]:
    """Train `policy` in place; after each iteration yield its statistics and the texts that were sampled."""
    value_head = nn.Linear(policy.config.n_embd, 1)  # hidden state (C,) to the score that is expected from there
    nn.init.zeros_(value_head.weight)
    nn.init.zeros_(value_head.bias)
    parameters = [*policy.parameters(), *value_head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=s.lr)
    beta = s.init_kl_coef
    sampling, shuffling = torch.Generator().manual_seed(s.seed), torch.Generator().manual_seed(s.seed + 1)

    for _ in range(s.iterations):
        # 1. Rollout: draw B prompts from the pool, and let the policy continue each by R tokens.
        drawn = torch.randint(len(prompts), (s.batch_size,), generator=shuffling)
        ids, mask = left_pad([tokenizer.encode_prompt(prompts[i]) for i in drawn])
        tokens, mask, nuclei = sample(policy, ids, mask, s.gen_len, s.top_p, sampling)

        # 2. Reward: one number for each whole text.
        texts = [tokenizer.decode(row[real == 1]) for row, real in zip(tokens, mask, strict=True)]
        scores = reward(texts)  # (B,)

        # 3. Log-probabilities (B, R) of the sampled tokens under both models, and values (B, R). They stay fixed:
        #    the update compares the changing policy with them.
        with torch.no_grad():
            old_logprobs, entropy, hidden = logprobs_of(policy, tokens, mask, nuclei)
            ref_logprobs, _, _ = logprobs_of(reference, tokens, mask, nuclei)
            old_values = value_head(hidden).squeeze(-1)

        # 4. Token rewards (B, R): every token pays for leaving the reference, the last one earns the score.
        kl = old_logprobs - ref_logprobs
        rewards = -beta * kl
        rewards[:, -1] += scores

        # 5. and 6. How much better each token was than expected, on a scale that fits the learning rate.
        advantages, returns = gae(rewards, old_values, s.gamma, s.lam)
        advantages = whiten(advantages)

        # 7. Update: several epochs over the batch.
        updates = []
        for _ in range(s.ppo_epochs):
            for rows in torch.randperm(s.batch_size, generator=shuffling).split(s.minibatch_size):
                logprobs, now_entropy, hidden = logprobs_of(policy, tokens[rows], mask[rows], nuclei[rows])
                values = value_head(hidden).squeeze(-1)
                policy_loss, clipfrac = clipped_policy_loss(logprobs, old_logprobs[rows], advantages[rows], s.cliprange)
                value_loss = clipped_value_loss(values, old_values[rows], returns[rows], s.cliprange_value)
                loss = policy_loss + s.vf_coef * value_loss - s.entropy_coef * now_entropy.mean()
                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(parameters, s.max_grad_norm)
                optimizer.step()
                updates.append(torch.stack([policy_loss, value_loss, clipfrac, grad_norm]).detach())

        # The controller: a KL above the target raises the price of KL, one below lowers it.
        mean_kl = kl.sum(-1).mean().item()
        policy_loss, value_loss, clipfrac, grad_norm = torch.stack(updates).mean(0).tolist()
        yield {
            "reward": scores.mean().item(), "kl": mean_kl, "kl_coef": beta, "entropy": entropy.sum(-1).mean().item(),
            "policy_loss": policy_loss, "value_loss": value_loss, "clipfrac": clipfrac, "grad_norm": grad_norm,
        }, texts  # fmt: skip
        error = min(max(mean_kl / s.target - 1, -0.2), 0.2)
        beta *= 1 + error * s.batch_size / s.horizon


def left_pad(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (B, P), padded on the left so that all responses begin in one column, and the mask of real tokens."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in sequences])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in sequences])
    return ids, mask


@torch.no_grad()
def sample(
    policy: GPT2, ids: Tensor, mask: Tensor, gen_len: int, top_p: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue prompts (B, P) by R tokens. Returns tokens (B, T), their mask, and the nuclei, bool (B, R, V).

    The nuclei are kept because training has to score each token under the distribution that it was drawn from: the
    policy restricted to the nucleus. Under the full softmax the ratio of step 7 would belong to another policy.
    """
    B, P = ids.shape
    uniforms = torch.rand(gen_len, B, dtype=torch.float64, generator=generator)
    cache = policy.new_cache(B, P + gen_len)  # keys and values of the tokens so far: each token is computed once
    tokens, new, nuclei = ids, ids, []
    for u in uniforms:
        logits = policy(new, mask, cache)[:, -1]  # (B, V), of the next token
        probs = logits.softmax(-1)
        nuclei.append(nucleus(probs, top_p))
        # Inverse distribution function: the first token at which the running sum of probabilities passes u.
        upto = torch.where(nuclei[-1], probs, 0.0).double().cumsum(-1)
        new = torch.searchsorted(upto, u[:, None] * upto[:, -1:], right=True)  # (B, 1)
        tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return tokens, mask, torch.stack(nuclei, 1)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Bool (B, V): the most probable tokens, as few as have the mass `top_p` together (Holtzman et al. 2020)."""
    values, order = probs.sort(dim=-1, descending=True, stable=True)
    mass_before = values.cumsum(-1) - values
    return torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, mass_before < top_p)


def logprobs_of(model: GPT2, tokens: Tensor, mask: Tensor, nuclei: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability (B, R) of each response token within its nucleus, entropy (B, R), and hidden states (B, R, C).

    Position t predicts token t + 1: the states before the response tokens are those of positions P - 1 to T - 2.
    """
    R = nuclei.size(1)
    hidden = model.hidden_states(tokens[:, :-1], mask[:, :-1])[:, -R:]
    logp = model.lm_logits(hidden).masked_fill(~nuclei, -torch.inf).log_softmax(-1)  # (B, R, V)
    entropy = -(logp.exp() * logp.masked_fill(~nuclei, 0.0)).sum(-1)  # outside the nucleus 0 * -inf would be NaN
    return logp.gather(-1, tokens[:, -R:, None]).squeeze(-1), entropy, hidden


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, R) by generalized advantage estimation.

    delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)     was the token better than the value head expected?
    A_t     = delta_t + gamma * lam * A_{t+1}       it also gets credit for what it led to
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # nothing comes after the last token
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
    return advantages, advantages + values  # the return is what the value head should have said


def whiten(x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all tokens of the batch."""
    return (x - x.mean()) / (x.var() + 1e-8).sqrt()


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """PPO's objective, negated: no gain from moving a token's probability by more than the clip range.

    Returns the loss, 0-d, and the share of tokens whose ratio is outside of the range.
    """
    ratio = (logprobs - old_logprobs).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))
    return loss.mean(), ((ratio - 1).abs() > cliprange).float().mean()


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """Squared error of the values, of which a change by more than the clip range brings no gain either."""
    clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square()).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=Settings.iterations)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    settings = Settings(**vars(parser.parse_args()))
    folder = WEIGHTS / "gpt2-chinese-reviews-small"
    policy, reference = GPT2.from_pretrained(folder), GPT2.from_pretrained(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    reward = SentimentReward.from_pretrained(WEIGHTS / "bert-chinese-reviews-sentiment-small", device="cpu")
    for i, (stats, texts) in enumerate(train(policy, reference, tokenizer, reward, PROMPTS, settings), 1):
        print(f"iteration {i:2}: reward {stats['reward']:.3f}, KL {stats['kl']:.2f}   {texts[0]!r}", flush=True)


if __name__ == "__main__":
    main()
