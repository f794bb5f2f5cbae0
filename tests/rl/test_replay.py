"""What was sampled is what is scored: over a small vocabulary, the replayed sets give exact gradients and KLs.

Every response that temperature, top-k and top-p leave possible is enumerated with its probability under the
truncated distribution mu, by code of its own and in float64. So expectations are sums, and nothing is left to chance.
"""

from dataclasses import dataclass

import pytest
import torch

from conftest import VOCAB
from minirlhf import GPT2, ActorCritic, GPT2Config, PPOTrainer, SamplingConfig, Tokenizer
from minirlhf.generation.sampling import pack_set, truncate
from minirlhf.rl.logprobs import response_logprobs
from minirlhf.text.batching import left_pad

V = 11
EOS = 124  # one that the random model of `collect` often draws
PROMPTS = [[2, 7, 5, 9], [2, 6]]  # of different lengths: the second one is padded
CASES = [
    pytest.param(SamplingConfig(1.0, 0, 0.8), 1, id="top-p, 1 token"),
    pytest.param(SamplingConfig(0.7, 5, 1.0), 2, id="top-k, cooler, 2 tokens"),
    pytest.param(SamplingConfig(1.4, 7, 0.85), 2, id="top-k, top-p, warmer, 2 tokens"),
]


def make_model(seed):
    config = GPT2Config(vocab_size=V, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4)
    return GPT2(config, seed=seed).double().eval()


def next_logits(model, prefix):
    """Logits (V,) after a prefix, from a forward pass over the prefix alone."""
    return model(torch.tensor([prefix]))[0, -1]


def allowed(logits, sampling):
    """The ids that may be drawn, by counting: temperature, then the k best, then the best until their mass is p."""
    cooled = [x / sampling.temperature for x in logits.tolist()]
    best = sorted(range(V), key=lambda i: (-cooled[i], i))[: sampling.top_k or V]
    weights = torch.tensor([cooled[i] for i in best], dtype=torch.float64).softmax(-1).tolist()
    kept, mass = [], 0.0
    for i, weight in zip(best, weights, strict=True):
        if kept and mass >= sampling.top_p:
            break
        kept.append(i)
        mass += weight
    return sorted(kept)


@dataclass
class World:
    """All N responses to all prompts that can be sampled, with the sets they come from."""

    model: GPT2
    reference: GPT2
    temperature: float
    length: int
    rows: list  # (prompt, response, [set of each token])
    tokens: torch.Tensor
    mask: torch.Tensor
    sets: torch.Tensor

    def log_truncated(self, model):
        """log mu of each response (N,), the sets held fixed, with its graph: one plain forward pass a token."""
        return torch.stack([sum(terms) for terms in self.terms(model)])

    def terms(self, model, full=False):
        for prompt, response, sets in self.rows:
            terms = []
            for t, (token, kept) in enumerate(zip(response, sets, strict=True)):
                logits = next_logits(model, prompt + response[:t]) / self.temperature
                terms.append(logits[token] - logits[list(range(V)) if full else kept].logsumexp(-1))
            yield terms

    def log_mass(self, model):
        """log Z summed over the states of each response (N,): how much mass the full softmax has in the sets."""
        totals = []
        for prompt, response, sets in self.rows:
            states = [next_logits(model, prompt + response[:t]) / self.temperature for t in range(len(response))]
            totals.append(sum(x[kept].logsumexp(-1) - x.logsumexp(-1) for x, kept in zip(states, sets, strict=True)))
        return torch.stack(totals)

    def weights(self):
        """Probability of each response (N,): mu, the prompts equally likely."""
        return self.log_truncated(self.model).exp().detach() / len(PROMPTS)

    def score(self, replay=True, reference=None, model=None):
        policy = ActorCritic(model or self.model).double()
        sets = self.sets if replay else None
        return response_logprobs(policy, self.tokens, self.mask, self.length, self.temperature, sets, reference)

    def gradient(self, scalar):
        grads = torch.autograd.grad(scalar, list(self.model.parameters()))
        return torch.cat([g.flatten() for g in grads])

    def estimate(self, advantages, replay):
        """E over mu of A(y) grad log-probability, as `response_logprobs` gives it."""
        logprobs = self.score(replay).logprobs.sum(-1)
        return self.gradient((self.weights() * advantages * logprobs).sum())


def make_world(sampling, length, seed=0):
    model, reference = make_model(seed), make_model(seed + 50)
    rows = []

    def extend(prompt, response, sets):
        if len(response) == length:
            rows.append((prompt, response, sets))
            return
        with torch.no_grad():
            kept = allowed(next_logits(model, prompt + response), sampling)
        for token in kept:
            extend(prompt, [*response, token], [*sets, kept])

    for prompt in PROMPTS:
        extend(prompt, [], [])
    ids, mask = left_pad([prompt for prompt, _, _ in rows])
    keep = torch.zeros(len(rows), length, V, dtype=torch.bool)
    for i, (_, _, sets) in enumerate(rows):
        for t, kept in enumerate(sets):
            keep[i, t, kept] = True
    responses = torch.tensor([response for _, response, _ in rows])
    tokens, mask = torch.cat([ids, responses], 1), torch.cat([mask, torch.ones_like(responses)], 1)
    return World(model, reference, sampling.temperature, length, rows, tokens, mask, pack_set(keep))


@pytest.fixture(scope="module")
def worlds():
    return {}


@pytest.fixture
def world(worlds, sampling, length):
    if (sampling, length) not in worlds:
        worlds[sampling, length] = make_world(sampling, length)
    return worlds[sampling, length]


def advantages_of(world, seed=0):
    return torch.randn(len(world.rows), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the gradient ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampling", "length"), CASES)
def test_the_enumeration_is_complete_and_truncated(world, sampling, length):
    assert world.weights().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert len(PROMPTS) * 2 <= len(world.rows) < len(PROMPTS) * V**length
    for prompt, _, sets in world.rows:
        logits = next_logits(world.model, prompt).detach()
        assert truncate(logits[None], sampling)[1][0].nonzero().flatten().tolist() == sets[0]


@pytest.mark.parametrize(("sampling", "length"), CASES)
def test_the_replayed_gradient_is_the_exact_one_and_the_full_softmax_is_biased(world, sampling, length):
    advantages = advantages_of(world)
    exact = world.gradient((world.log_truncated(world.model).exp() / len(PROMPTS) * advantages).sum())
    assert exact.norm() > 0.1
    torch.testing.assert_close(world.estimate(advantages, replay=True), exact, rtol=0, atol=1e-10)

    full = world.estimate(advantages, replay=False)
    error = ((full - exact).norm() / exact.norm()).item()
    assert error > 0.05, f"relative error of the full softmax {error:.3f}"


@pytest.mark.parametrize(("sampling", "length"), CASES)
def test_a_constant_advantage_moves_nothing_unless_scored_with_the_full_softmax(world, sampling, length):
    constant = torch.ones(len(world.rows), dtype=torch.float64)
    assert world.estimate(constant, replay=True).abs().max() < 1e-12
    # What is left of the full softmax pushes mass into the sets: E[A] grad log Z.
    full = world.estimate(constant, replay=False)
    mass = world.gradient((world.weights() * world.log_mass(world.model)).sum())
    assert full.norm() > 0.1
    torch.testing.assert_close(full, mass, rtol=0, atol=1e-10)


def test_sets_are_those_of_sampling_time_though_the_policy_has_moved():
    """After the policy has become another model, its own nucleus is another one; the stored sets still apply."""
    sampling = SamplingConfig(0.7, 5, 0.9)
    world = make_world(sampling, 2)
    moved = make_model(99)
    own = [allowed(next_logits(moved, prompt).detach(), sampling) for prompt, _, _ in world.rows]
    assert any(response[0] not in kept for (_, response, _), kept in zip(world.rows, own, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(
            world.score(model=moved).logprobs.sum(-1), world.log_truncated(moved), rtol=0, atol=1e-11
        )


# ---- KL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampling", "length"), CASES)
@torch.no_grad()
def test_the_reference_is_restricted_to_the_same_sets(world, sampling, length):
    scored = world.score(reference=world.reference)
    expected = world.log_truncated(world.reference)
    torch.testing.assert_close(scored.ref_logprobs.sum(-1), expected, rtol=0, atol=1e-11)
    # Over what the policy can sample after one prompt, the restricted reference sums to 1.
    of_prompt = torch.tensor([prompt == PROMPTS[0] for prompt, _, _ in world.rows])
    assert expected.exp()[of_prompt].sum().item() == pytest.approx(1.0, abs=1e-12)
    # Not the reference's own set: some of these tokens it would never draw itself.
    own = [allowed(next_logits(world.reference, prompt), sampling) for prompt, _, _ in world.rows]
    assert any(sets[0] != kept for (_, _, sets), kept in zip(world.rows, own, strict=True))
    # In full, it has its mass elsewhere.
    full = world.score(replay=False, reference=world.reference)
    assert full.ref_logprobs.sum(-1).exp()[of_prompt].sum() < 0.95


@pytest.mark.parametrize(("sampling", "length"), CASES)
@torch.no_grad()
def test_mean_k1_is_the_kl_of_the_truncated_distributions(world, sampling, length):
    weights, scored = world.weights(), world.score(reference=world.reference)
    log_ratio = world.log_truncated(world.model) - world.log_truncated(world.reference)
    exact = (weights * log_ratio).sum().item()
    k1 = (weights * (scored.logprobs - scored.ref_logprobs).sum(-1)).sum().item()
    over_the_set = (weights * scored.exact_kl.sum(-1)).sum().item()
    assert exact > 0.05
    assert k1 == pytest.approx(exact, abs=1e-11)
    assert over_the_set == pytest.approx(exact, abs=1e-11)


@torch.no_grad()
def test_the_negative_kl_of_examples_readme():
    """pi = (.8, .2), reference = (.9, .1), top-p .7: only the first token is ever drawn."""

    def two_tokens(probs):
        model = GPT2(GPT2Config(vocab_size=2, n_positions=4, n_embd=4, n_layer=1, n_head=1), seed=0).double().eval()
        for parameter in model.parameters():
            parameter.zero_()
        model.ln_f.bias[0] = 1.0  # the hidden state is (1, 0, 0, 0) everywhere, so column 0 holds the logits
        model.wte.weight[:, 0] = torch.tensor(probs, dtype=torch.float64).log()
        return model

    policy, reference = ActorCritic(two_tokens([0.8, 0.2])).double(), two_tokens([0.9, 0.1])
    keep = truncate(policy(torch.tensor([[1]]))[0][0], SamplingConfig(top_p=0.7))[1]
    assert keep.tolist() == [[True, False]]
    drawn = torch.tensor([[1, 0]])
    full = response_logprobs(policy, drawn, None, 1, 1.0, None, reference)
    replayed = response_logprobs(policy, drawn, None, 1, 1.0, pack_set(keep)[None], reference)
    expected = torch.tensor(0.8 / 0.9, dtype=torch.float64).log().item()
    assert (full.logprobs - full.ref_logprobs).item() == pytest.approx(expected, abs=1e-12)
    assert replayed.logprobs.item() == replayed.ref_logprobs.item() == 0.0


# ---- in the trainer -------------------------------------------------------------------------------------------------


def collect(make, logprobs_full_softmax):
    """A trainer whose reference equals its policy, and a ragged truncated batch of it."""
    sizes = dict(n_embd=16, n_layer=1, n_head=2, scale=4.0)
    policy, reference = ActorCritic(make(0, **sizes)), make(0, **sizes)
    trainer = PPOTrainer(
        policy, reference, Tokenizer(VOCAB), steps=32, batch_size=32, minibatch_size=8, forward_batch_size=3, gen_len=6,
        ppo_epochs=1, lr=1e-3, temperature=1.3, top_k=30, top_p=0.8, seed=4, eos_token_id=EOS, device="cpu",
        logprobs_full_softmax=logprobs_full_softmax,
    )  # fmt: skip
    rollout = trainer.collect(["酒店很好", "早", "房间", "wifi"] * 8, lambda texts: [len(set(t)) / 9 for t in texts])
    return trainer, rollout


@pytest.mark.parametrize("logprobs_full_softmax", [False, True])
def test_at_the_first_minibatch_the_ratio_is_one_and_the_kl_to_oneself_zero(make_decoder, logprobs_full_softmax):
    trainer, rollout = collect(make_decoder, logprobs_full_softmax)
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs, rtol=0, atol=1e-6)
    stats = trainer.step(rollout)
    assert stats["ppo/policy/first_ratio_error"] < 1e-5
    assert stats["ppo/policy/ratio_error"] > 1e-3  # of all minibatches: the policy did move
    for name in ("kl", "kl_k2", "kl_k3", "kl_exact"):
        assert stats[f"objective/{name}"] == pytest.approx(0.0, abs=1e-5), name
