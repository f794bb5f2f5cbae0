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

Methods that divide the advantages by the standard deviation of a group, and not the KL, have beta times that deviation
in the place of beta; docs/algorithms.md derives it. The others without values end where PPO does.
"""

import itertools

import pytest
import torch

from minirlhf import GPT2, GPT2Config, PPOTrainer, Rollout, Tokenizer
from minirlhf.rl.presets import PRESETS
from minirlhf.rl.rollout import logprobs_in_batches

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


def trained(seed=1, count=1024, pairs=False, **settings):
    """The reference's distribution and that of a policy trained until it stands still, (121,) each.

    pairs: groups of two, drawn at random from a sample of all responses, in the place of two large ones.
    """
    config = GPT2Config(vocab_size=V, n_positions=8, n_embd=32, n_layer=1, n_head=2, initializer_range=0.1)
    policy, reference, tokenizer = GPT2(config, seed=seed), GPT2(config, seed=seed).eval(), Tokenizer(VOCAB)
    prompt = tokenizer.encode_prompt("大")
    ref = distribution(reference, prompt)
    sizes = dict(steps=60 * count, batch_size=count, minibatch_size=count, forward_batch_size=count, gen_len=LENGTH)
    if settings.get("group_size", 1) > 1:
        # Two so large that mean and deviation of a group are those of the policy.
        settings["group_size"] = 2 if pairs else count // 2
    settings = {**settings, **sizes, "lr": 4e-3, "lr_schedule": "linear", "adaptive_kl": False, "ppo_epochs": 2}
    trainer = PPOTrainer(policy, reference, tokenizer, **settings, top_p=1.0, seed=seed, device="cpu", precision="fp32")
    generator, G = torch.Generator().manual_seed(seed), trainer.config.group_size
    for _ in range(trainer.config.iterations):
        p = distribution(trainer.policy.decoder, prompt)
        parts = 2 if G > 2 else 1  # each large group is a sample of all responses
        responses = torch.cat([systematic(p, count // parts, generator) for _ in range(parts)])
        responses = responses[torch.randperm(count, generator=generator)] if pairs else responses
        tokens = torch.cat([torch.tensor(prompt).expand(count, -1), responses], 1)
        known = logprobs_in_batches(trainer.models, tokens, torch.ones_like(tokens), LENGTH, 1.0)
        real, scores = torch.ones_like(responses, dtype=torch.bool), reward_of(responses).float()
        trainer.step(Rollout(tokens, torch.ones_like(tokens), real, scores=scores, group_size=G, **known))
    return ref, distribution(trainer.policy.decoder, prompt)


def compare(ref, learned, expected, kl):
    before, after = (0.5 * (p - expected).abs().sum().item() for p in (ref, learned))  # total variation
    assert before > 0.3
    assert after < 0.03
    assert (learned * (learned / expected).log()).sum() < kl


PPO = dict(lam=1.0, vf_coef=0.5, cliprange_value=10.0)


@pytest.mark.parametrize(("estimator", "placement", "beta", "whitened"), [
    ("k1", "reward", 0.3, True), ("exact", "reward", 0.3, False), ("k2", "loss", 0.3, True), ("k3", "loss", 0.6, False),
])  # fmt: skip
def test_a_leash_with_a_fixed_beta_ends_at_its_fixed_point(estimator, placement, beta, whitened):
    leash = dict(kl_estimator=estimator, kl_placement=placement, init_kl_coef=beta)
    # Terms of the exact KL do not vanish one by one at the optimum, as those of k1 do: more noise of the sample.
    count = {"k1": 1024, "exact": 2048}.get(estimator, 512)
    ref, learned = trained(count=count, **PPO, **leash, whiten_advantages=whitened)
    expected = fixed_point(estimator, ref, beta)
    if placement == "loss":  # another point than the optimum
        assert 0.5 * (expected - fixed_point("k1", ref, beta)).abs().sum() > 0.04
    compare(ref, learned, expected, 1e-3 if placement == "reward" else 0.01)


@pytest.mark.parametrize("name", ["reinforce", "rloo", "rloo_to_go", "reinforce++"])
def test_a_method_with_the_kl_in_the_reward_ends_at_the_optimum(name):
    ref, learned = trained(**{**PRESETS[name], "init_kl_coef": 0.3})
    compare(ref, learned, fixed_point("k1", ref, 0.3), 1e-3)


def with_standard_deviation(ref, beta):
    """GRPO's point: k3 in the loss with beta times the deviation of the scores under the point itself."""
    scores, p = reward_of(RESPONSES), ref
    for _ in range(100):
        sigma = ((p * scores**2).sum() - (p * scores).sum() ** 2).sqrt()
        p = 0.5 * (p + fixed_point("k3", ref, beta * sigma))
    return p


@pytest.mark.parametrize("name", ["dr_grpo", "grpo", "gspo", "dapo"])
def test_a_method_with_k3_in_the_loss_ends_at_its_fixed_point(name):
    beta = 0.6 if name == "dr_grpo" else 1.5
    clips = dict(cliprange=0.2, cliprange_high=0.28) if name == "gspo" else {}
    ref, learned = trained(count=512, **{**PRESETS[name], **clips, "init_kl_coef": beta})
    plain, divided = fixed_point("k3", ref, beta), with_standard_deviation(ref, beta)
    assert 0.5 * (plain - divided).abs().sum() > 0.1
    compare(ref, learned, plain if name == "dr_grpo" else divided, 0.01)


@pytest.mark.parametrize(("name", "estimator", "placement", "factor"), [
    ("rloo", "k2", "loss", 1), ("dr_grpo", "k1", "reward", 1), ("dr_grpo", "exact", "reward", 2),
    ("dr_grpo", "k3", "loss", 2),
])  # fmt: skip
def test_in_small_groups_dr_grpo_has_a_stronger_leash_in_the_loss(name, estimator, placement, factor):
    """Its advantages are those of RLOO times (G - 1) / G, here a half; a KL in the loss is not scaled with them."""
    beta = 0.3 if estimator != "k3" else 0.6
    settings = dict(advantages=name, group_size=2, whiten_advantages=False, kl_estimator=estimator)
    ref, learned = trained(pairs=True, kl_placement=placement, init_kl_coef=beta / factor, **settings)
    near, far = (
        0.5 * (learned - fixed_point(estimator, ref, b)).abs().sum()
        for b in (beta, beta / 2 if factor > 1 else 2 * beta)
    )
    assert near < 0.1 and far > 2 * near
