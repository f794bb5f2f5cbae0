"""One whole PPO step in float64 against the oracle: the same weights after all epochs, clipping and AdamW."""

import numpy as np
import pytest
import torch

import oracle
from conftest import MAKERS, make_tiny
from conftest import TINY_TOKENS as TOKENS
from minirlhf import ActorCritic, PPOConfig, PPOTrainer, Tokenizer, ValueHead
from minirlhf.generation.sampling import unpack_set
from minirlhf.rl.presets import KL_PLACEMENTS, METHODS, PRESETS

DEFAULTS = dict(
    batch_size=5, minibatch_size=2, forward_batch_size=2, ppo_epochs=2, lr=3e-3, top_p=1.0, device="cpu", gen_len=4,
    horizon=50.0, target=2.0, adaptive_kl=True,
)  # fmt: skip
READ_BY_THE_ORACLE = (
    "lr", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "entropy_coef", "max_grad_norm", "adam_eps",
    "temperature", "kl_estimator", "kl_placement", "whiten_advantages", "whiten_scope", "whiten_ddof", "whiten_rewards",
    "loss_averaging", "forward_batch_size", "advantages", "group_size", "cliprange_high", "policy_ratio", "gen_len",
)  # fmt: skip


def models(head="linear", seed=0, apart=0.3, kind="gpt2"):
    """A policy and a reference some way apart, in float64, with every parameter away from its neutral value."""
    generator = torch.Generator().manual_seed(seed)
    decoder, reference = make_tiny(kind), make_tiny(kind)
    policy = ActorCritic(decoder, ValueHead(decoder.width, head)).double()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.5)
        for p, own in zip(reference.parameters(), policy.decoder.parameters(), strict=True):
            p.copy_(own + torch.randn(p.shape, generator=generator, dtype=p.dtype) * apart)
    return policy, reference


def random_rows(seed, count, longest=5):
    """Ragged rows; the first ends at its first token, the last one is the longest."""
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(1, longest + 1, count - 1), longest] if count > 1 else [longest]
    if count > 2:
        lengths[0] = 1
    rows = []
    while len(rows) < count:
        query = rng.integers(0, len(TOKENS), rng.integers(1, min(longest, 5) + 1)).tolist()
        response = rng.integers(0, len(TOKENS), lengths[len(rows)]).tolist()
        if all(query + response != r["query"] + r["response"] for r in rows):  # they are told apart by their tokens
            rows.append({"query": query, "response": response, "score": float(rng.integers(-16, 17)) / 8})
    return rows


def arrays(policy, reference):
    own = {name: p.detach().numpy().copy() for name, p in policy.named_parameters()}
    return own, {f"decoder.{name}": p.detach().numpy().copy() for name, p in reference.named_parameters()}


class Order:
    """Watches which rows a trainer's updates see, in order; what they are cut into is known from the settings."""

    def __init__(self, trainer, rows):
        self.seen, self.rows, inner = [], rows, trainer._loss

        def loss(batch):
            self.seen += [row[m.bool()].tolist() for row, m in zip(batch.tokens, batch.mask, strict=True)]
            return inner(batch)

        trainer._loss = loss

    def minibatches(self, size):
        whole = [r["query"] + r["response"] for r in self.rows]
        count, out = len(whole), []
        for epoch in range(len(self.seen) // count):
            order, left = [], list(range(count))
            for tokens in self.seen[epoch * count : (epoch + 1) * count]:  # every row once an epoch; equal ones: any
                order.append(next(b for b in left if whole[b] == tokens))
                left.remove(order[-1])
            out += [order[i : i + size] for i in range(0, count, size)]
        self.seen.clear()
        return out


def run_both(rows, steps=1, head="linear", seed=0, kind="gpt2", **settings):
    """The library's step and the oracle's, on the same rows; asserts agreement and returns the oracle's statistics."""
    settings = {**DEFAULTS, "batch_size": len(rows), **settings}
    policy, reference = models(head, seed, kind=kind)
    params, ref_params = arrays(policy, reference)
    trainer = PPOTrainer(policy, reference, Tokenizer(TOKENS), **settings)
    order = Order(trainer, rows)
    given = {name: getattr(trainer.config, name) for name in READ_BY_THE_ORACLE}
    coef, state, expected = trainer.config.init_kl_coef, None, {}
    for _ in range(steps):
        stats = trainer.step(
            [torch.tensor(r["query"]) for r in rows],
            [torch.tensor(r["response"]) for r in rows],
            [r["score"] for r in rows],
        )
        minibatches = order.minibatches(trainer.config.minibatch_size)
        assert len(minibatches) == trainer.config.ppo_epochs * -(-len(rows) // trainer.config.minibatch_size)
        params, state, expected = oracle.ppo_step(
            params, ref_params, rows, minibatches, n_head=2, kl_coef=coef, head_kind=head, state=state, **given
        )
        for name, value in expected.items():
            if name in stats:
                assert stats[name] == pytest.approx(value, rel=1e-9, abs=1e-11), name
        assert stats["objective/kl_coef"] == pytest.approx(coef, rel=1e-9)
        if trainer.config.adaptive_kl:
            target, horizon = trainer.config.target, trainer.config.horizon
            coef = oracle.adaptive_kl(coef, expected["objective/kl"], len(rows), target, horizon)
        compare(trainer, params)
    return expected


def compare(trainer, params):
    moved = 0.0
    for name, p in trainer.policy.named_parameters():
        assert p.dtype == torch.float64
        np.testing.assert_allclose(p.detach().numpy(), params[name], rtol=0, atol=1e-9, err_msg=name)
        moved = max(moved, float(np.abs(params[name]).max()))
    assert moved > 0


@pytest.mark.parametrize(("seed", "kind"), [(0, "gpt2"), (1, "gpt2"), (0, "llama")])
def test_a_step_over_ragged_rows(seed, kind):
    run_both(random_rows(seed, 5), seed=seed, kind=kind)


def test_a_step_over_rows_of_1_to_40_tokens():
    run_both([*random_rows(11, 3, longest=40), *random_rows(12, 1, longest=17)], ppo_epochs=1)


def test_the_oracle_moves_the_weights_by_more_than_the_tolerance():
    policy, reference = models()
    params, ref = arrays(policy, reference)
    moved, _, _ = oracle.ppo_step(params, ref, random_rows(0, 3), [[0, 1], [2]], n_head=2, lr=3e-3)
    assert min(np.abs(moved[n] - params[n]).max() for n in params) > 1e-4


@pytest.mark.parametrize("settings", [{}, dict(whiten_scope="sequence", gamma=0.9), dict(whiten_rewards=True)])
def test_a_step_on_scores_of_single_tokens(settings):
    rows = random_rows(15, 5)
    rng = np.random.default_rng(15)
    for row in rows:
        row["score"] = (rng.integers(-16, 17, len(row["response"])) / 8).tolist()
    run_both(rows, **settings)


@pytest.mark.parametrize("rows", [
    random_rows(3, 1), [{"query": [5], "response": [3], "score": 1.5}], random_rows(4, 1) * 4,
], ids=["one row", "one token", "equal rows"])  # fmt: skip
def test_a_step_of_few_or_equal_rows(rows):
    run_both(rows)


def test_a_step_in_micro_batches_that_do_not_divide_the_minibatch():
    run_both(random_rows(5, 5), minibatch_size=3, forward_batch_size=2)


def test_a_step_with_entropy_bonus_discount_and_temperature():
    run_both(random_rows(6, 4), entropy_coef=0.05, gamma=0.9, lam=0.7, temperature=0.6, vf_coef=0.5)


def test_a_step_with_the_bounded_value_head():
    run_both(random_rows(7, 4), head="tanh", vf_coef=1.0)


def test_a_step_in_which_ratio_and_value_clips_bind():
    stats = run_both(random_rows(8, 5), lr=0.03, ppo_epochs=3, cliprange=0.05, cliprange_value=0.02, vf_coef=1.0)
    assert stats["clipped"] > 10


def test_a_step_with_extreme_log_ratios():
    stats = run_both(random_rows(9, 4), lr=1.0, ppo_epochs=3, adam_eps=1e-5)
    assert stats["limited"] > 3


@pytest.mark.parametrize("max_grad_norm", [0.01, float("inf")])
def test_a_step_with_and_without_gradient_clipping(max_grad_norm):
    stats = run_both(random_rows(10, 4), max_grad_norm=max_grad_norm)
    assert stats["ppo/grad_norm"] > 0.01


def test_several_steps_carry_optimizer_and_kl_coefficient_on():
    run_both(random_rows(11, 4), steps=3, horizon=10.0, init_kl_coef=0.5)


def test_several_steps_with_a_fixed_kl_coefficient():
    run_both(random_rows(12, 3), steps=2, adaptive_kl=False)


UNWHITENED, PER_ROW = dict(whiten_advantages=False), dict(whiten_scope="sequence", whiten_ddof=0)


@pytest.mark.parametrize(
    "settings", [{}, UNWHITENED, PER_ROW, dict(whiten_scope="minibatch", loss_averaging="sequences")]
)
@pytest.mark.parametrize(("kind", "placement"), KL_PLACEMENTS)
def test_a_step_with_each_leash(kind, placement, settings):
    run_both(random_rows(13, 4), kl_estimator=kind, kl_placement=placement, init_kl_coef=0.5, **settings)


@pytest.mark.parametrize("settings", [
    dict(whiten_scope="minibatch"),
    dict(whiten_scope="sequence"),
    dict(whiten_ddof=0),
    dict(whiten_rewards=True),
    dict(whiten_scope="sequence", whiten_rewards=True, whiten_ddof=0),
    dict(whiten_scope="minibatch", whiten_rewards=True),
    dict(loss_averaging="sequences", minibatch_size=3, forward_batch_size=2),
    dict(loss_averaging="micro_batches", minibatch_size=3, forward_batch_size=2),
    dict(whiten_advantages=False, whiten_rewards=True),
])  # fmt: skip
def test_a_step_in_the_variants_of_other_implementations(settings):
    run_both(random_rows(14, 5), entropy_coef=0.01, **settings)


def rows_of(rollout):
    """What the oracle takes, of a sampled rollout."""
    R, rows = rollout.response_mask.size(1), []
    sets = unpack_set(rollout.sampling_sets, len(TOKENS))
    for b, response in enumerate(rollout.tokens[:, -R:]):
        length = int(rollout.response_mask[b].sum())
        query = rollout.tokens[b, :-R][rollout.mask[b, :-R].bool()].tolist()
        keep = sets[b, :length].numpy()
        score = float(rollout.scores[b])
        rows.append({"query": query, "response": response[:length].tolist(), "keep": keep, "score": score})
    return rows


@pytest.mark.parametrize(("leash", "kind"), [({}, "gpt2"), (dict(kl_estimator="exact"), "gpt2"), ({}, "llama")])
def test_a_step_on_sampled_rows_in_their_sampling_sets(leash, kind):
    policy, reference = models(seed=1, kind=kind)
    params, ref_params = arrays(policy, reference)
    trainer = PPOTrainer(
        policy, reference, Tokenizer(TOKENS),
        **{**DEFAULTS, "top_p": 0.7, "temperature": 0.8, "eos_token_id": 8, "lr": 1e-2, **leash},
    )  # fmt: skip
    rollout = trainer.collect(["a", "b c", "g f e", "d", "a b"], lambda texts: [len(t) / 4 for t in texts])
    rows = rows_of(rollout)
    assert not all(r["keep"].all() for r in rows)
    order = Order(trainer, rows)
    stats = trainer.step(rollout)
    expected, _, figures = oracle.ppo_step(
        params, ref_params, rows, order.minibatches(2), n_head=2, lr=1e-2, temperature=0.8, **leash
    )
    assert stats["objective/kl"] == pytest.approx(figures["objective/kl"], rel=1e-9)
    compare(trainer, expected)


OF_METHODS = dict(
    batch_size=6, minibatch_size=3, forward_batch_size=2, group_size=3, ppo_epochs=2, lr=3e-3, top_p=0.9,
    temperature=0.8, gen_len=5, eos_token_id=11, device="cpu", init_kl_coef=0.3, seed=3,
    cliprange=0.02, cliprange_high=0.03,  # which some ratios reach
)  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["ppo", *METHODS])
def test_three_steps_of_each_method_on_groups_that_it_samples(name, kind):
    """Ragged rows that end by themselves, groups of equal scores among them; two epochs, top-p .9, temperature .8."""
    config = PPOConfig(**{**PRESETS.get(name, {}), **OF_METHODS})
    policy, reference = models(seed=1, kind=kind)
    with torch.no_grad():  # flatter distributions, for samples that differ
        for p in (*policy.decoder.final_norm.parameters(), *reference.final_norm.parameters()):
            p.mul_(0.5)
    trainer = PPOTrainer(policy, reference, Tokenizer(TOKENS), config)
    params, ref_params = arrays(trainer.policy, reference)
    given, state, logged, lengths = {name: getattr(config, name) for name in READ_BY_THE_ORACLE}, None, [], set()
    for prompts in (["a", "b c"], ["g f e", "d"], ["a c", "f"]):
        rollout = trainer.collect(prompts, lambda texts: [float(len(set(text)) // 2) for text in texts])
        rows = rows_of(rollout)
        coef, order = trainer.kl_controller.coef, Order(trainer, rows)
        logged.append(trainer.step(rollout))
        params, state, expected = oracle.ppo_step(
            params, ref_params, rows, order.minibatches(3), n_head=2, kl_coef=coef, state=state, **given
        )
        for figure in ("ppo/loss/policy", "objective/kl"):
            assert logged[-1][figure] == pytest.approx(expected[figure], rel=1e-9, abs=1e-11)
        compare(trainer, params)
        lengths |= {len(row["response"]) for row in rows}
    assert len(lengths) > 2 and any(stats["ppo/policy/clipfrac"] > 0 for stats in logged)
    assert max(stats["reward/flat_groups"] for stats in logged) == (0.0 if name == "dapo" else 0.5)
