"""GRPO for language models in one file: what is left of PPO without a value head. Read ppo_in_one_file.py first.

    python examples/grpo_in_one_file.py [--iterations 40 --seed 0]      # a few minutes on two CPU cores

PPO asks a value head how good a text was expected to be, GRPO (Shao et al. 2024) the other responses to its prompt.
Each iteration samples G responses to each prompt (1), scores them by reward (2) and log-probabilities (3), takes score
less group mean over group standard deviation as the advantage of all tokens of a response (4), and minimises the
clipped loss plus beta * KL (5). Tokens are sampled from the full softmax, and scored with it. `minirlhf/rl/` has more,
and `tests/examples/test_grpo_in_one_file.py` shows that both give the same numbers.
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
    group_size: int = 8  # G, responses a prompt
    gen_len: int = 16  # R, tokens sampled after each prompt
    ppo_epochs: int = 4  # passes over each batch
    minibatch_size: int = 32  # texts an optimizer step
    lr: float = 2e-4
    max_grad_norm: float = 1.0
    cliprange: float = 0.2  # of the probability ratio
    init_kl_coef: float = 0.15  # beta, the weight of the KL in the loss
    seed: int = 0


Reward, Steps = Callable[[list[str]], Tensor], Iterator[tuple[dict[str, float], list[str]]]


def train(
    policy: GPT2, reference: GPT2, tokenizer: Tokenizer, reward: Reward, prompts: list[str], s: Settings
) -> Steps:
    """Train `policy` in place; yield statistics and the texts that were sampled."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=s.lr)
    sampling, shuffling = torch.Generator().manual_seed(s.seed), torch.Generator().manual_seed(s.seed + 1)
    count, G = s.batch_size // s.group_size, s.group_size

    for _ in range(s.iterations):
        # 1. Rollout: the G responses to a prompt stand side by side.
        drawn = torch.randint(len(prompts), (count,), generator=shuffling).repeat_interleave(G)
        rows = [tokenizer.encode_prompt(prompts[i]) for i in drawn]
        P = max(map(len, rows))  # prompts are padded on the left, so that all responses begin in one column
        tokens = torch.tensor([[0] * (P - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (P - len(row)) + [1] * (len(row) + s.gen_len) for row in rows])
        tokens = sample(policy, tokens, mask, s.gen_len, sampling)
        # 2. Reward: one number for each whole text.
        texts = [tokenizer.decode(row[real == 1]) for row, real in zip(tokens, mask, strict=True)]
        scores = reward(texts)  # (B,)
        # 3. Log-probabilities (B, R), fixed during the update.
        with torch.no_grad():
            old_logprobs, ref_logprobs = (logprobs_of(m, tokens, mask, s.gen_len) for m in (policy, reference))
        # 4. Advantages (B, 1), one for all tokens of a response; 0 in a group of equal scores, not 0 / 0.
        groups = scores.view(count, G)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
        advantages = advantages.masked_fill(groups.amin(1, True) == groups.amax(1, True), 0.0).view(-1, 1)
        # 5. Update: no value loss, and the KL is in the loss; k3 = exp(-l) - 1 + l with l = log(pi / pi_ref).
        updates = []
        for _ in range(s.ppo_epochs):
            order = torch.randperm(count, generator=shuffling)[:, None] * G + torch.arange(G)
            for rows in order.flatten().split(s.minibatch_size):
                logprobs = logprobs_of(policy, tokens[rows], mask[rows], s.gen_len)
                ratio, log_ratio = (logprobs - old_logprobs[rows]).exp(), logprobs - ref_logprobs[rows]
                clipped = ratio.clamp(1 - s.cliprange, 1 + s.cliprange)
                policy_loss = torch.maximum(-advantages[rows] * ratio, -advantages[rows] * clipped).mean()
                loss = policy_loss + s.init_kl_coef * (torch.expm1(-log_ratio) + log_ratio).mean()
                optimizer.zero_grad()
                loss.backward()
                grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), s.max_grad_norm)
                optimizer.step()
                updates.append(torch.stack([policy_loss, (ratio != clipped).float().mean(), grad_norm]).detach())
        means = *torch.stack(updates).mean(0), scores.mean(), (old_logprobs - ref_logprobs).sum(-1).mean()
        names = ("policy_loss", "clipfrac", "grad_norm", "reward", "kl")
        yield {name: x.item() for name, x in zip(names, means, strict=True)}, texts


@torch.no_grad()
def sample(policy: GPT2, tokens: Tensor, mask: Tensor, gen_len: int, generator: torch.Generator) -> Tensor:
    """Continue prompts (B, P) to tokens (B, T). mask: (B, T), 1 at real tokens."""
    B, P = tokens.shape
    cache, new = policy.new_cache(B, P + gen_len), tokens  # keys and values so far: each token is computed once
    for t, u in enumerate(torch.rand(gen_len, B, dtype=torch.float64, generator=generator)):
        upto = policy(new, mask[:, : P + t], cache)[:, -1].softmax(-1).double().cumsum(-1)  # (B, V)
        new = torch.searchsorted(upto, u[:, None] * upto[:, -1:], right=True)  # where the running sum passes u
        tokens = torch.cat([tokens, new], 1)
    return tokens


def logprobs_of(model: GPT2, tokens: Tensor, mask: Tensor, R: int) -> Tensor:
    """Log-probabilities (B, R) of the response tokens: position t predicts token t + 1."""
    logp = model.lm_logits(model.hidden_states(tokens[:, :-1], mask[:, :-1])[:, -R:]).log_softmax(-1)  # (B, R, V)
    return logp.gather(-1, tokens[:, -R:, None]).squeeze(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO on the starter weights")
    parser.add_argument("--iterations", type=int, default=Settings.iterations)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    settings, folder = Settings(**vars(parser.parse_args())), WEIGHTS / "gpt2-chinese-reviews-small"
    policy, reference, tokenizer = (kind.from_pretrained(folder) for kind in (GPT2, GPT2, Tokenizer))
    reward = SentimentReward.from_pretrained(WEIGHTS / "bert-chinese-reviews-sentiment-small", device="cpu")
    for i, (stats, texts) in enumerate(train(policy, reference, tokenizer, reward, PROMPTS, settings), 1):
        print(f"iteration {i:2}: reward {stats['reward']:.3f}, KL {stats['kl']:.2f}   {texts[0]!r}", flush=True)


if __name__ == "__main__":
    main()
