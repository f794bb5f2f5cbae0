"""A task whose optimum is known exactly: PPO must find it, with every leash that it allows.

The maximum of E[r(y)] - beta KL(p || ref) is p*(y) proportional to ref(y) exp(r(y) / beta) (Ziegler et al. 2019,
section 2.2; Korbak et al. 2022). Over 11 tokens and responses of 2 it can be enumerated. A wrong sign, a wrong scale
or a shift by one moves the fixed point, however good the curves look.

k1 in the reward and the exact KL aim at that optimum. In the loss, an estimator pulls at the state in which a token was
drawn, and not at those to which the token leads. With Q(s, a) the expected reward after token a, no KL in it, a fixed
point p has, in every state s, sum_a grad p(a) Q(s, a) equal to beta times the mean gradient of the estimator:

    k2   E_p[log(p / ref) grad log p] = grad KL(p || ref), so p(a) is proportional to ref(a) exp(Q(s, a) / beta)
    k3   E_p[(1 - ref / p) grad log p] = -sum_a ref(a) grad log p(a) = grad KL(ref || p), so, with a multiplier c for
         sum_a p(a) = 1:  Q(s, a) + beta ref(a) / p(a) = c, p(a) = beta ref(a) / (c - Q(s, a))
"""

import itertools

import pytest
import torch

from minirlhf import GPT2, ActorCritic, GPT2Config, PPOTrainer, Tokenizer

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"好坏大小早晚"]
V, LENGTH = len(VOCAB), 2
RESPONSES = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))  # (121, 2)


def reward_of(responses):
    """Depends on both tokens and on their order, so that no factorised policy and no shifted one is optimal."""
    first, second = responses.T
    return (first == 5).double() * 0.6 + (second == first + 1).double() * 0.8 - (second == 0).double() * 0.5


def distribution(model, prompt):
    """p(y) of all responses, by the chain rule (121,)."""
    tokens = torch.cat([torch.tensor(prompt).expand(len(RESPONSES), -1), RESPONSES], 1)
    with torch.no_grad():
        logp = model(tokens)[:, len(prompt) - 1 : -1].double().log_softmax(-1)
    return logp.gather(-1, RESPONSES[..., None]).sum((1, 2)).exp()


def tilted(ref, q, beta):
    """p(a) proportional to ref(a) exp(q(a) / beta), over the last dimension."""
    return (ref.log() + q / beta).softmax(-1)


def inverse(ref, q, beta):
    """p(a) = beta ref(a) / (c - q(a)), with the c above all q at which they sum to 1, by bisection."""
    low = q.amax(-1, keepdim=True)
    high = low + beta  # there every p(a) is at most ref(a)
    for _ in range(60):
        middle = (low + high) / 2
        above = (beta * ref / (middle - q)).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return beta * ref / (high - q)


def fixed_point(estimator, ref, beta):
    """Where a leash ends (121,). ref: (121,) of the reference."""
    rewards, joint = reward_of(RESPONSES).view(V, V), ref.view(V, V)
    if estimator in ("k1", "exact"):
        return tilted(ref, rewards.flatten(), beta)
    solve = tilted if estimator == "k2" else inverse
    first, second = joint.sum(1), joint / joint.sum(1, keepdim=True)
    after = solve(second, rewards, beta)  # (V, V), the second token after each first one
    return (solve(first, (after * rewards).sum(1), beta)[:, None] * after).flatten()


def systematic(p, count, generator):
    """Responses (count, 2) of which each is there count * p times, rounded up or down: a systematic sample.

    It is unbiased, and has so little noise that the trained policy stands still at its fixed point.
    """
    places = (torch.arange(count) + torch.rand((), generator=generator, dtype=p.dtype)) / count
    return RESPONSES[torch.searchsorted(p.cumsum(0), places).clamp_max(len(p) - 1)]


LEASHES = [("k1", "reward", 0.3), ("exact", "reward", 0.3), ("k2", "loss", 0.3), ("k3", "loss", 0.6)]


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize(("estimator", "placement", "beta"), LEASHES)
def test_a_leash_with_a_fixed_beta_ends_at_its_fixed_point(estimator, placement, beta, whitened, seed=1):
    config = GPT2Config(vocab_size=V, n_positions=8, n_embd=32, n_layer=1, n_head=2, initializer_range=0.1)
    policy, reference = ActorCritic(GPT2(config, seed=seed)), GPT2(config, seed=seed).eval()
    tokenizer = Tokenizer(VOCAB)
    prompt = tokenizer.encode_prompt("大")
    ref = distribution(reference, prompt)
    trainer = PPOTrainer(
        policy, reference, tokenizer, steps=40 * 512, batch_size=512, minibatch_size=128, forward_batch_size=128,
        gen_len=LENGTH, lr=2e-3, lr_schedule="linear", lam=1.0, adaptive_kl=False, init_kl_coef=beta, top_p=1.0,
        vf_coef=0.5, cliprange_value=10.0, ppo_epochs=2, seed=seed, device="cpu", kl_estimator=estimator,
        kl_placement=placement, whiten_advantages=whitened,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for _ in range(trainer.config.iterations):
        responses = systematic(distribution(policy.decoder, prompt), 512, generator)
        trainer.step([torch.tensor(prompt)] * 512, list(responses), reward_of(responses))

    learned, expected = distribution(policy.decoder, prompt), fixed_point(estimator, ref, beta)
    before, after = (0.5 * (p - expected).abs().sum().item() for p in (ref, learned))  # total variation
    assert before > 0.3
    if placement == "loss":  # another point than the optimum
        assert 0.5 * (expected - fixed_point("k1", ref, beta)).abs().sum() > 0.04
    assert after < 0.03
    assert (learned * (learned / expected).log()).sum() < 0.01
